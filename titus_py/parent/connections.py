"""Connections that have a worker: begun, established, over. Run by the parent.

A worker may send only the messages of ``between.messages``, and an identity where its virtual host
asks for certificates; anything else is an alarm.
"""

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from socket import SocketType
from typing import TYPE_CHECKING, Any

from keyd.protocol import ANY_NAME, Done, Grant, GrantSet, Power, Refusal, Status
from titus_py.between import messages
from titus_py.between.event_loop import EventLoop, Timer
from titus_py.between.hand_over import give
from titus_py.between.messages import Client, Dial, Ends, Established, Proxied, Ready, Tunnel
from titus_py.between.plan import Plan, VirtualHost
from titus_py.between.virtual_host import TlsSettings, applies_to
from titus_py.parent.admission import Admission, LimitsHit
from titus_py.parent.arrival import Arrival
from titus_py.parent.backends import Backends
from titus_py.parent.giving_way import GivingWay
from titus_py.parent.outbox import Tell
from titus_py.parent.worker import Offer, Worker

if TYPE_CHECKING:
    from titus_py.parent.identities import Identities

__all__ = ["CLIENT_GONE", "Connections"]

#: <asm-generic/socket.h>; Python does not know it.
_SO_BINDTOIFINDEX = 62
#: How long after its handshake timeout a worker may take to end by itself.
_GRACE_SECONDS = 2.0
#: Why a worker that takes longer still is killed: it got no processor time, or runs other code
#: than ours.
_OVERDUE = "did not keep to its handshake timeout"
#: Why a worker is killed that stays although its client has left.
CLIENT_GONE = "client_gone"
#: Refusals that an honest worker may get: keyd was too slow, keyd was started with other keys than
#: the configuration has, or keyd's OpenSSL failed.
_NOBODYS_FAULT = (Status.EXPIRED, Status.UNKNOWN_KEY, Status.FAILED)


class Connections:
    """The workers that have a client."""

    def __init__(
        self,
        loop: EventLoop,
        plan: Plan,
        admission: Admission,
        limits_hit: LimitsHit,
        backends: Backends,
        tell: Tell,
    ) -> None:
        self._loop = loop
        self._plan = plan
        self._admission = admission
        self._limits_hit = limits_hit
        self._backends = backends
        self._tell = tell
        #: All of them, by uid.
        self.busy: dict[int, Worker] = {}
        #: All of them, by the numbers of their connections.
        self._numbered: dict[int, Worker] = {}
        #: Those whose handshake is not done yet, the oldest first.
        self.handshaking: dict[int, Worker] = {}
        #: Runs until the first of them has had its time.
        self._overdue: Timer | None = None
        # A worker that has not asked for its backend by then never will.
        self._most_seconds = plan.handshake_timeout + _GRACE_SECONDS
        # Connection numbers are unique until the machine reboots, whatever is restarted and
        # however the wall clock is set.
        self.next_number = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000
        self.offer = lru_cache(maxsize=1024)(self._offer)
        # A newcomer may stand still for as long, within its handshake.
        self._giving_way = GivingWay(self.busy, self.handshaking, plan.handshake_timeout)
        #: The ids of each virtual host's keys, with the names that they are for.
        self._keys = [_keys(vhost) for vhost in plan.vhosts]
        #: What is offered at one local address or another, by the virtual hosts.
        self._offers: dict[tuple[int, ...], Offer] = {}
        self._message_octets = messages.WORKER_MESSAGE_OCTETS
        self._decode: Callable[[bytes], object] = messages.decode_from_worker
        self._without_waiting = _closing(plan)
        self._identities = _identities(plan)
        if self._identities is not None:
            self._message_octets = self._identities.MESSAGE_OCTETS
            self._decode = self._identities.decode

    def have_key(self, key: bytes) -> bool:
        """Whether a virtual host signs with the key of this id."""
        return any(key == one for keys in self._keys for _, one in keys)

    def begin(
        self,
        worker: Worker,
        arrival: Arrival,
        offer: Offer,
        sockets: Sequence[SocketType],
        channel: SocketType | None,
    ) -> None:
        """Give a client to a spare worker.

        ``sockets`` are the client's, and that of a tunnel's server. If there is a channel to keyd,
        they are within it.
        """
        connection = self.next_number
        self.next_number += 1
        self._make_room()
        worker.connection = connection
        worker.address = arrival.address
        worker.awaits_header = arrival.proxy_timeout > 0
        worker.counted = not worker.awaits_header
        worker.ends = ends = arrival.ends
        worker.endpoints = ends
        if ends.client.startswith("unix:"):
            worker.endpoints = None
            worker.inode = os.fstat(arrival.client.fileno()).st_ino
        # The service manager may have bound the listening socket. If not, the kernel binds what it
        # accepts through a VRF (net.ipv4.tcp_l3mdev_accept).
        interface = arrival.client.getsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX)
        if interface and "%" not in arrival.address:
            # The kernel finds the connection by it, too.
            worker.endpoints = ends._replace(client=f"{arrival.address}%{interface}")
        worker.client = _text(arrival.address, arrival.port)
        worker.local = _text(arrival.local_address, arrival.local_port)
        worker.offer = offer
        worker.client_hello = arrival.client_hello
        worker.tunnel = arrival.tunnel
        if arrival.server is not None and arrival.backend is not None:
            self._backends.assign(worker, arrival.server, arrival.backend)
        worker.started = time.monotonic()
        if self._overdue is None:
            self._overdue = self._loop.after(self._most_seconds, self._end_overdue)
        self.busy[worker.uid] = self.handshaking[worker.uid] = worker
        self._numbered[connection] = worker
        try:
            given: Client | Tunnel = Client(offer.vhosts, arrival.proxy_timeout)
            if arrival.tunnel is not None:
                given = Tunnel(arrival.tunnel, keyed=bool(offer.grants.grants))
            with self._without_waiting():
                give(worker.socket, given.encode(), sockets, channel)
        except OSError as error:
            worker.kill(f"does not take a client: {error.strerror}")
        # Reported only now, so that the worker does not wait for this. A tunnel's connection begins
        # when its server is known: until then, the log may have one line for many.
        if not worker.awaits_header and worker.tunnel is None:
            self._tell_begun(worker)

    def over(self, arrival: Arrival, end: str, level: str = "info", detail: str = "") -> None:
        """Record a client that had no worker: it ended too early, or its tunnel has no server."""
        connection = self.next_number
        self.next_number += 1
        self._tell(
            "connection_over",
            level=level,
            connection=connection,
            client=_text(arrival.address, arrival.port),
            local=_text(arrival.local_address, arrival.local_port),
            **_tunnel(arrival.tunnel),
            seconds=round(time.monotonic() - arrival.since, 3),
            end=end,
            detail=detail or None,
        )

    def hear(self, worker: Worker) -> bool:
        """Receive a worker's message; returns whether it says "ready for a client"."""
        try:
            octets = worker.socket.recv(self._message_octets)
        except (BlockingIOError, ConnectionResetError):
            # A reset is told once. What the worker had sent is still to be heard, and then its end.
            return False
        if not octets:
            # The worker has closed its socket, or ended. If it has ended, its pidfd tells.
            self._loop.unwatch(worker.socket.fileno())
            worker.socket.close()
            return False
        if worker.killed_for:
            # What it had sent before it is dead gets it nothing any more.
            return False
        try:
            message = self._decode(octets)
        except messages.Malformed as error:
            self._alarm(worker, "malformed_message", str(error))
            return False
        if isinstance(message, Ready) and not worker.ready:
            worker.ready = True
            return True
        if (
            isinstance(message, Dial)
            and worker.offer is not None
            and worker.vhost is None
            and not worker.awaits_header
            and message.vhost in worker.offer.vhosts
            and _negotiable(message.protocol, self._plan.vhosts[message.vhost].tls)
            and (message.facts is not None) == self._plan.vhosts[message.vhost].passes_tls_facts
            and (self._identities is None or self._identities.allow(worker, message.vhost))
        ):
            self._established(worker, message)
        elif isinstance(message, Established) and self._may_be_established(worker):
            self._tell_begun(worker)
            self._past_handshake(worker)
        elif isinstance(message, Proxied) and worker.awaits_header:
            self._introduced(worker, message.ends)
        elif (
            worker.awaits_header
            or self._identities is None
            or not self._identities.take(worker, message)
        ):
            self._alarm(worker, "unexpected_message", str(message))
        return False

    def ended(self, worker: Worker, how: str) -> None:
        """Record a connection's end; ``how`` is empty if its worker exited as it should."""
        self._backends.ended(worker)
        if self._identities is not None:
            self._identities.ended(worker)
        if worker.deadline is not None:
            worker.deadline.cancel()
        self.handshaking.pop(worker.uid, None)
        del self.busy[worker.uid]
        del self._numbered[worker.connection]
        if worker.counted:
            self._admission.leave(worker.address)
        if worker.awaits_header:
            self._tell_begun(worker)
        level = "warning" if worker.killed_for in (_OVERDUE, CLIENT_GONE) else "info"
        explained = worker.explains(how)
        if not explained:
            level = "alarm"
        unfinished = worker.signed and worker.vhost is None and worker.tunnel is None
        self._tell(
            "connection_over",
            report=worker.report,
            level=level,
            connection=worker.connection,
            client=worker.client,
            local=worker.local,
            **_balancer(worker),
            vhost=worker.vhost,
            **_tunnel(worker.tunnel),
            **_negotiated(worker.protocol),
            **self._named(worker),
            seconds=round(time.monotonic() - worker.started, 3),
            worker_seconds=round(time.monotonic() - worker.forked, 3),
            end=worker.killed_for or how,
            **({"how": how} if worker.killed_for and not explained else {}),
            uid=worker.uid,
            backend=self._backends.chosen(worker),
            source=worker.source,
            **({"unfinished": True} if unfinished else {}),
        )
        if unfinished and self._admission.unfinished(worker.address):
            self._tell(
                "signed_unfinished",
                connection=worker.connection,
                client=worker.client,
                local=worker.local,
            )

    def signed(self, done: Done) -> None:
        """keyd has done an operation. An audit's is for no connection."""
        worker = self._numbered.get(done.connection)
        if worker is not None:
            worker.signed = True

    def refused(self, refusal: Refusal) -> None:
        """keyd refused what a worker asked, and says for which connection: report it."""
        worker = self._numbered.get(refusal.connection)
        level = "error" if refusal.status in _NOBODYS_FAULT else "alarm"
        if refusal.status is Status.UNWITNESSED:
            # A client can bring this about.
            level = "warning"
        self._tell(
            "keyd_refused",
            level=level,
            connection=refusal.connection,
            client=worker.client if worker else None,
            uid=worker.uid if worker else None,
            status=refusal.status.name.lower(),
            attempted=refusal.detail,
        )
        if worker is not None and worker.uid in self.handshaking and not worker.orphaned:
            # Most have an answer. One has none if keyd had no room for its channel.
            worker.deny_channel()

    def give_way(self, without_worker: int) -> Worker | None:
        """End a connection for a newcomer's sake: the proxy is full. Returns its worker, if any.

        ``without_worker`` is how many clients have come before it and have no worker yet. Raises
        OSError where the kernel cannot be asked which connection stands still.
        """
        if len(self.handshaking) + without_worker >= self._plan.limits.handshakes:
            # In a flood of newcomers, the place of an idle one is soon taken by the next of them.
            return None
        worker = self._giving_way.choose()
        if worker is not None:
            worker.kill("gave_way")
        return worker

    def _make_room(self) -> None:
        """If too many are in their handshake, kill the worker of the oldest one."""
        if len(self.handshaking) >= self._plan.limits.handshakes:
            # Off the list now, not when it has ended, so that the next newcomer ends another one.
            slowest = self.handshaking.pop(next(iter(self.handshaking)))
            slowest.kill("handshakes_limit")
            self._limits_hit.note("handshakes", slowest.address)

    def _end_overdue(self) -> None:
        """Kill the workers that have not done their handshake in time."""
        self._overdue = None
        long_ago = time.monotonic() - self._most_seconds
        for worker in self.handshaking.values():
            if worker.started > long_ago:
                self._overdue = self._loop.after(worker.started - long_ago, self._end_overdue)
                return
            worker.kill(_OVERDUE)

    def _introduced(self, worker: Worker, ends: Ends | None) -> None:
        """A worker has read a load balancer's header: the client's address is known now.

        No octet of the client's has reached the worker yet, so it says what the balancer said. It
        is asked once: what it says after that is an alarm.
        """
        worker.awaits_header = False
        if ends is not None:
            worker.balancer = worker.client
            worker.ends = ends
            worker.address = ends.client
            worker.client = _text(ends.client, ends.client_port)
        self._tell_begun(worker)
        limit = self._admission.refuse_address(worker.address)
        if limit is None:
            worker.counted = True
        else:
            worker.kill(limit)
            self._limits_hit.note(limit, worker.address)

    def _tell_begun(self, worker: Worker) -> None:
        self._tell(
            "connection_begun",
            connection=worker.connection,
            client=worker.client,
            local=worker.local,
            **_balancer(worker),
            **_tunnel(worker.tunnel),
            uid=worker.uid,
        )

    def _may_be_established(self, worker: Worker) -> bool:
        """Whether our code can say so: of a tunnel's connection, and once."""
        return worker.tunnel is not None and worker.uid in self.handshaking

    def _established(self, worker: Worker, dial: Dial) -> None:
        """A worker says that its handshake is done: connect to its virtual host's backend."""
        worker.vhost = dial.vhost
        alpn = self._plan.vhosts[dial.vhost].tls.alpn
        if alpn and dial.protocol is not None:
            worker.protocol = alpn[dial.protocol]
        self._past_handshake(worker)
        limit = self._identities.admit(worker) if self._identities is not None else None
        if limit is not None:
            worker.kill(limit)
            self._limits_hit.note(limit, worker.address, **self._named(worker))
            return
        named = self._named(worker)
        if named:
            # For the status. In the log, it is with the connection's end.
            name = named["client_name"]
            self._tell("client_known", connection=worker.connection, client_name=name)
        self._backends.dial(worker, dial)

    def _past_handshake(self, worker: Worker) -> None:
        self.handshaking.pop(worker.uid, None)
        worker.client_hello = b""
        if self._plan.limits.lifetime is not None:
            worker.deadline = self._loop.after(
                self._plan.limits.lifetime, lambda: worker.kill("lifetime")
            )

    def _named(self, worker: Worker) -> dict[str, str]:
        """What its client is called, as a field for the log, if its virtual host knows it."""
        name = self._identities.name_of(worker) if self._identities is not None else None
        return {} if name is None else {"client_name": name}

    def _alarm(self, worker: Worker, event: str, attempted: str) -> None:
        """A worker did what our code never does: raise an alarm, once, and kill it."""
        if worker.killed_for:
            return
        self._tell(
            event,
            level="alarm",
            connection=worker.connection,
            client=worker.client,
            uid=worker.uid,
            attempted=attempted,
        )
        worker.kill(event)

    def _offer(self, address: str, port: int) -> Offer:
        """The virtual hosts of a local address, and what keyd may do for them."""
        vhosts = tuple(
            number
            for number, vhost in enumerate(self._plan.vhosts)
            if applies_to(vhost.local_address, vhost.local_port, address, port)
        )
        if vhosts not in self._offers:
            grants = GrantSet(len(self._offers), tuple(self._grants(vhosts)))
            self._offers[vhosts] = Offer(vhosts, grants)
        return self._offers[vhosts]

    def _grants(self, vhosts: tuple[int, ...]) -> Iterator[Grant]:
        # A key that others sign with decrypts what their clients sent. The check refuses such a
        # configuration; whatever it overlooks, keyd is to refuse.
        users = Counter(key for keys in self._keys for key in {key for _, key in keys})
        for number in vhosts:
            powers = _powers(self._plan.vhosts[number].tls)
            for name, key in self._keys[number]:
                of_it = powers - {Power.DECRYPT} if users[key] > 1 else powers
                yield Grant(number, name, key, of_it)


def _powers(tls: TlsSettings) -> frozenset[Power]:
    """What handshakes of these settings need."""
    powers = set()
    if tls.max_version == "TLSv1.3":
        powers.add(Power.SIGN_TLS13)
    if tls.min_version == "TLSv1.2":
        speaks_both = tls.max_version == "TLSv1.3"
        powers.add(Power.SIGN_TLS12_MARKED if speaks_both else Power.SIGN_TLS12)
        if "X448" in (tls.groups or ()):
            powers.add(Power.SIGN_TLS12_X448)
    if tls.rsa_key_exchange:
        powers.add(Power.DECRYPT)
    return frozenset(powers)


def _negotiable(protocol: int | None, tls: TlsSettings) -> bool:
    """Whether a worker that keeps to these settings can have negotiated this."""
    if protocol is None:
        return not tls.alpn_required
    return protocol < len(tls.alpn or ())


def _negotiated(protocol: str | None) -> dict[str, str]:
    """A protocol for the record, if there is one."""
    return {"alpn": protocol} if protocol is not None else {}


def _closing(plan: Plan) -> Callable[[], AbstractContextManager[None]]:
    """For the end of a client that cannot be given away, or of a tunnel's server."""
    if not (plan.has_unix_clients or plan.connects_to_unix_sockets):
        return nullcontext
    # Others do not need it in their memory.
    from titus_py.between.closing import without_waiting

    return without_waiting


def _identities(plan: Plan) -> "Identities | None":
    if all(vhost.clients is None for vhost in plan.vhosts):
        return None
    # Others do not need it in their memory.
    from titus_py.parent.identities import Identities

    return Identities(plan)


def _keys(vhost: VirtualHost) -> list[tuple[str, bytes]]:
    """The names that it takes, each with the id of a key for it."""
    if vhost.certificate_index is not None:
        from titus_py.between.certificate_index import names

        return names(vhost.certificate_index)
    keys = [bytes.fromhex(certificate.key) for certificate in vhost.certificates]
    server_names = (ANY_NAME,) if vhost.server_names is None else vhost.server_names
    return [(name.lower(), key) for name in server_names for key in keys]


def _balancer(worker: Worker) -> dict[str, Any]:
    """The load balancer that a connection came through, as a field for the log."""
    return {"balancer": worker.balancer} if worker.balancer else {}


def _tunnel(number: int | None) -> dict[str, int]:
    """The tunnel that a connection is for, as a field for the log."""
    return {} if number is None else {"tunnel": number}


def _text(host: str, port: int) -> str:
    if host.startswith("unix:"):
        return f"{host},pid={port}" if port else host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
