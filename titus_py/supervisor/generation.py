"""A generation: one configuration, one parent and one keyd, and the sockets between them.

Run by the supervisor. Parent and keyd are started with execve(2), so that each begins with a
clean address space. Beside its standard streams, each gets exactly the descriptors that its
arguments and its plan name.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from keyd.linux import seccomp
from keyd.linux.descriptors import send_descriptors
from keyd.linux.process import how_ended, signals_held_back
from keyd.linux.sealed import sealed_file
from keyd.provider import openssl_configuration
from keyd.upstream.state import UpstreamState
from titus_py import configuration
from titus_py.between import certificate_index
from titus_py.between.event_loop import Timer
from titus_py.between.hand_over import KEYD_FD
from titus_py.between.plan import (
    Certificate,
    Check,
    Limits,
    Listener,
    Plan,
    ResolvedAddress,
    State,
    VirtualHost,
)
from titus_py.between.tunnel_terms import TunnelTerms
from titus_py.configuration import tokens, upstreams
from titus_py.configuration.address import Address, Bindable, NameAddress, UnixAddress
from titus_py.configuration.checking import CertificateFacts, Checked, names_shown
from titus_py.configuration.client_certificates import client_terms
from titus_py.configuration.lending import told
from titus_py.configuration.limits_table import default_handshakes, default_per_prefix
from titus_py.parent.system_calls import FAILING, parent_calls
from titus_py.supervisor.listeners import Wishes

__all__ = ["ALIVE_SECONDS", "Child", "Generation"]

#: How long a load balancer may take for its PROXY header.
_PROXY_SECONDS = 5.0
#: How often the parent and keyd say that they are alive.
ALIVE_SECONDS = 3.0
#: The arguments with which Python starts each of them.
_KEYD = ("-m", "keyd", "serve")
_PARENT = ("-m", "titus_py.parent.life")
#: A setting that pyOpenSSL has no call for (SSL_CONF_cmd(3)). Without resumption, a TLS 1.3
#: ticket is of no use.
_TLS_COMMANDS = "NumTickets = 0"


class Child:
    """A process that the supervisor started, and the supervisor's end of their socket.

    ``process`` is only a pid if the supervisor's previous program started it (``succession``).
    """

    def __init__(
        self, name: str, process: "subprocess.Popen[bytes] | int", end: socket.socket
    ) -> None:
        self.name = name
        self.socket = end
        self.pid = process if isinstance(process, int) else process.pid
        #: While the child is starting: the timer that kills it if that takes too long.
        self.patience: Timer | None = None
        self.pidfd = os.pidfd_open(self.pid)
        self.started = self.last_heard = time.monotonic()
        self._process = process
        #: Orders not sent yet, each with our own duplicates of its descriptors.
        self._orders: deque[tuple[bytes, list[int]]] = deque()

    def queue(self, order: Mapping[str, object], descriptors: Sequence[int] = ()) -> bool:
        """Queue an order for ``send_orders``; returns whether no other one waits."""
        octets = json.dumps(order).encode()
        self._orders.append((octets, [os.dup(descriptor) for descriptor in descriptors]))
        return len(self._orders) == 1

    def send_orders(self) -> bool:
        """Send the orders that the child takes, without waiting; returns whether that was all.

        A child that has gone or hangs is noticed elsewhere.
        """
        while self._orders:
            octets, descriptors = self._orders[0]
            try:
                send_descriptors(self.socket, octets, descriptors)
            except BlockingIOError:
                return False
            except OSError:
                pass
            self._drop_order()
        return True

    @property
    def has_heard_all(self) -> bool:
        """Whether no order waits to be sent."""
        return not self._orders

    def _drop_order(self) -> None:
        for descriptor in self._orders.popleft()[1]:
            os.close(descriptor)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def bury(self) -> str:
        """Reap the child and close its descriptors; returns how it ended, in words."""
        if isinstance(self._process, int):
            code = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        else:
            code = self._process.wait()
        while self._orders:
            self._drop_order()
        os.close(self.pidfd)
        self.socket.close()
        return how_ended(code)


class Generation:
    """A configuration as it was read, and the two processes that serve it.

    The certificates are those that were checked, even if the files have changed since. The files
    are not read here: they may also hold a private key, so only keyd and ``keyd check`` do that.
    """

    def __init__(self, number: int, checked: Checked, filters: Mapping[str, str]) -> None:
        if checked.configuration is None:
            raise ValueError("a configuration with mistakes")
        self.number = number
        self.checked = checked
        self.configuration = checked.configuration
        #: Where its clients' connections go on to.
        self.backends = frozenset(
            backend for vhost in self.configuration.vhost for _, backend in vhost.all_backends
        ).union(*(tunnel.connect for tunnel in self.configuration.tunnel))
        #: Those of them that are checked, each way of checking once.
        self.checks = tuple(
            dict.fromkeys(
                Check(str(backend), vhost.health.plan, vhost.send_proxy)
                for vhost in self.configuration.vhost
                if vhost.health is not None
                for _, backend in vhost.all_backends
            )
        )
        self.certificates = checked.certificates
        self.files = checked.files
        self.keyd: Child | None = None
        self.parent: Child | None = None
        #: keyd is a service of its own, and is not connected yet.
        self.waits_for_keyd = self.configuration.keyd.socket is not None
        #: The parent has no connection to that keyd: not yet, or not any more. ``keyd_missed`` is
        #: why, once that is known.
        self.without_keyd = self.waits_for_keyd
        self.keyd_missed = ""
        #: keyd is there, but with other keys: it is not used before certificates are read anew.
        self.keyd_held = False
        #: Its keyd has other keys than the certificates: a file has changed since it was checked.
        self.lacks_keys = False
        #: Backends' names that have not been looked up yet.
        self.unresolved: set[NameAddress] = set()
        #: How keyd's tokens are, each with its name.
        self.tokens: list[tuple[str, str]] = []
        #: How its upstreams are.
        self.upstreams: list[UpstreamState] = []
        #: What keyd has done for each of the hosts that it lends keys to, as it says.
        self.lent: list[list[Any]] = []
        #: The keys that keyd had when it was last connected.
        self.keyds_keys: set[str] | None = None
        #: Replaced by a later generation: it keeps its connections and takes no new ones.
        self.retired = False
        #: Its connections are being ended, to make room for another generation.
        self.gives_way = False
        #: Its parent was told to retire, and has not confirmed it.
        self.retiring = False
        #: Its fork server has ended: no more workers can be made.
        self.crippled = False
        #: It has taken over, and that it listens was logged.
        self.announced = False
        #: The children that are not ready yet.
        self.starting: set[Child] = set()
        #: The parent's live connections, by number: the event with which each began.
        self.connections: dict[int, dict[str, Any]] = {}
        #: The latest connections that have ended: a refusal of keyd's may be heard after the end.
        self.ended: deque[dict[str, Any]] = deque(maxlen=1000)
        #: The listeners that were opened for it.
        self.added: dict[Bindable, socket.socket] = {}
        self.spares = 0
        self.started, self.begun = datetime.now(UTC), time.monotonic()
        #: The uids that its parent may give to workers.
        self.uids = range(0)
        self._filters = filters

    @property
    def state(self) -> str:
        if self.retired:
            return "retired"
        return "serving" if self.ready and self.announced else "starting"

    @property
    def listening(self) -> list[Bindable]:
        """The addresses that its clients connect to."""
        return self.configuration.listening

    @property
    def wishes(self) -> Wishes:
        """How it wants its listening sockets."""
        return Wishes.of(self.configuration)

    @property
    def ready(self) -> bool:
        """Whether both processes serve, and no backend's name is waited for."""
        return not (self.starting or self.waits_for_keyd or self.unresolved)

    @property
    def children(self) -> list[Child]:
        return [child for child in (self.keyd, self.parent) if child is not None]

    @property
    def uids_needed(self) -> int:
        """One for each worker, and one for the parent."""
        return self.configuration.worker.max + self.configuration.worker.spare + 1

    @property
    def key_ids(self) -> set[str]:
        """The keys that keyd is to have: SHA-256 of the public key, in hexadecimal."""
        ids = {facts.key_id.hex() for facts in self.certificates.values()}
        return ids | {facts.key_id.hex() for facts in self.checked.lent.values()}

    @property
    def inherited_keys(self) -> list[str]:
        """Those that are not in their files any more: the keyd before hands them over."""
        return [
            self.certificates[one].key_id.hex() for one in sorted(self.checked.inherited, key=str)
        ]

    def start_keyd(self, predecessor: socket.socket | None = None) -> socket.socket:
        """Start keyd; returns the parent's end of its control socket. Raises OSError.

        ``predecessor`` is a socket to the keyd that hands it the keys that it inherits.
        """
        keyd = self.configuration.keyd.user
        files = dict.fromkeys(
            (
                str(one.key),
                one.passphrase_file and str(one.passphrase_file),
                one.directory is not None,
            )
            for one in self.certificates
            if one.key is not None and one not in self.checked.inherited
        )
        files |= dict.fromkeys(
            (str(one.key), one.passphrase_file and str(one.passphrase_file), False)
            for one in self.checked.lent
            if one.key is not None
        )
        self.keyd, control = _start_keyd(
            {
                "inherited": self.inherited_keys,
                "uid": keyd.uid,
                "gid": keyd.gid,
                "chroot": str(self.configuration.worker.chroot),
                "must_lock": self.configuration.keyd.lock_memory == "required",
                "filter": self._filters["keyd"],
                "tokens": tokens.told(
                    self.configuration.keyd,
                    [*self.certificates.items(), *self.checked.lent.items()],
                ),
                "upstreams": upstreams.told(
                    self.configuration.keyd,
                    [facts.reference for one, facts in self.certificates.items() if one.upstream],
                ),
                "lending": told(self.configuration, self.checked.lent),
                "keys": [
                    {"key": key, "passphrase_file": phrase, "may_be_missing": in_directory}
                    for key, phrase, in_directory in files
                ],
            },
            predecessor,
        )
        self.starting.add(self.keyd)
        return control

    def start_parent(
        self,
        control: socket.socket | None,
        uids: range,
        listeners: Mapping[Bindable, socket.socket],
        addresses: Mapping[Address, tuple[ResolvedAddress, ...]],
        states: Mapping[Check, State],
    ) -> None:
        """Start the parent, which gets keyd's control socket now or later. Raises OSError."""
        self.uids = uids
        worker, limits = self.configuration.worker, self.configuration.limits
        plan = Plan(
            listeners=tuple(map(self._listener, listeners, listeners.values())),
            vhosts=tuple(map(self._virtual_host, self.configuration.vhost)),
            tunnels=tuple(map(self.tunnel_terms, self.configuration.tunnel)),
            addresses={str(backend): addresses.get(backend, ()) for backend in self.backends},
            checks=self.checks,
            states=tuple(map(states.get, self.checks)),
            first_uid=uids[0],
            last_uid=uids[-2],
            max_workers=worker.max,
            spare_workers=worker.spare,
            handshake_timeout=worker.handshake_timeout,
            connect_timeout=worker.connect_timeout,
            limits=Limits(
                limits.connections_per_address,
                limits.connections_per_prefix or default_per_prefix(worker.max),
                limits.connections_per_second,
                limits.handshakes or default_handshakes(worker.max),
                limits.idle_timeout,
                limits.half_closed_timeout,
                limits.keepalive,
                limits.lifetime,
                limits.unfinished.per_prefix,
                limits.unfinished.every,
            ),
            chroot=str(worker.chroot),
            required=worker.require,
            worker_filter=self._filters["worker"],
            parent_uid=uids[-1],
            parent_filter="",
            backend_groups=worker.backend_gids,
        )
        calls = parent_calls(
            plan.connects_to_unix_sockets, plan.binds_clients_addresses, plan.has_unix_clients
        )
        plan = plan._replace(parent_filter=seccomp.build(calls, failing=FAILING).hex())
        self.parent = _start_parent(plan, control)
        self.starting.add(self.parent)

    def _write_index(self, vhost: configuration.VirtualHost) -> int | None:
        """The certificates of its directory, if it has one: a descriptor."""
        if vhost.certificate_dir is None:
            return None
        names = names_shown(vhost, self.certificates)
        numbers = {one: number for number, one in enumerate(dict.fromkeys(names.values()))}
        return certificate_index.write(
            [_certificate(self.certificates[one]) for one in numbers],
            {name: numbers[one] for name, one in names.items()},
        )

    def adopt(self, name: str, pid: int, descriptor: int, starting: bool) -> None:
        """Take over a process that this process's previous program started, and its socket."""
        end = socket.socket(fileno=descriptor)
        end.setblocking(False)
        child = Child(name, pid, end)
        if name == "keyd":
            self.keyd = child
        else:
            self.parent = child
        if starting:
            self.starting.add(child)

    def _listener(self, address: Bindable, listener: socket.socket) -> Listener:
        """A socket on this address, which may be a part of the address that is configured."""
        unix = isinstance(address, UnixAddress)
        for number, tunnel in enumerate(self.configuration.tunnel):
            if tunnel.listen.covers(address):
                return Listener(listener.fileno(), (), 0.0, number, unix=unix)
        table = next(table for table in self.configuration.listen if table.address.covers(address))
        # The header's time is a part of the handshake's.
        proxy_timeout = min(
            table.proxy_timeout or _PROXY_SECONDS, self.configuration.worker.handshake_timeout
        )
        balancers, starttls = table.accept_proxy_from or (), table.starttls is not None
        return Listener(listener.fileno(), balancers, proxy_timeout, starttls=starttls, unix=unix)

    def _virtual_host(self, vhost: configuration.VirtualHost) -> VirtualHost:
        shown = [self.certificates[one] for one in vhost.credentials.values()]
        return VirtualHost(
            server_names=vhost.sni,
            local_address=vhost.local_address,
            local_port=vhost.local_port,
            certificates=tuple(map(_certificate, shown)),
            certificate_index=self._write_index(vhost),
            backend=tuple(map(str, vhost.backend)),
            backends={
                protocol: tuple(map(str, backends)) for protocol, backends in vhost.backends.items()
            },
            balance=vhost.balance,
            health=None if vhost.health is None else vhost.health.plan,
            tls=vhost.tls,
            truncated=vhost.truncated,
            send_proxy=vhost.send_proxy,
            source_address=vhost.source_address,
            clients=client_terms(vhost, self.checked.authorities),
        )

    def tunnel_terms(self, tunnel: configuration.Tunnel) -> TunnelTerms:
        """What a tunnel of its configuration is to do."""
        files, own = tunnel.client_files, tunnel.credential
        authorities = "" if files is None else self.checked.authorities[files].authorities
        return TunnelTerms(
            connect=tuple(map(str, tunnel.connect)),
            balance=tunnel.balance,
            connect_timeout=tunnel.connect_timeout or self.configuration.worker.connect_timeout,
            server_name=tunnel.verified_name,
            authorities=authorities,
            pins=tunnel.pins or (),
            min_version=tunnel.lowest_version,
            alpn=tunnel.alpn,
            send_proxy=tunnel.send_proxy,
            drain=tunnel.drain,
            starttls=tunnel.starttls is not None,
            for_keyd=tunnel.listen in (self.configuration.keyd.upstream or ()),
            certificate=own and _certificate(self.certificates[own]),
        )


def _certificate(facts: CertificateFacts) -> Certificate:
    return Certificate(facts.chain, facts.reference, facts.key_id.hex())


def _start_keyd(
    settings: dict[str, object], predecessor: socket.socket | None
) -> tuple[Child, socket.socket]:
    """Start keyd; returns it and the parent's end of its control socket. Raises OSError."""
    parents_end, keyds_end = _socketpair()
    settings_fd = sealed_file("keyd-settings", json.dumps(settings).encode())
    given = {"settings-fd": settings_fd, "parent-fd": keyds_end.detach()}
    if predecessor is not None:
        given["predecessor-fd"] = predecessor.detach()
    return _start("keyd", _KEYD, given), parents_end


def _start_parent(plan: Plan, keyd: socket.socket | None) -> Child:
    """Start the parent with this plan. It gets the socket ``keyd``. Raises OSError."""
    milliseconds = int(plan.handshake_timeout * 1000)
    channel = f"channel_fd = {KEYD_FD}\ntimeout_ms = {milliseconds}"
    openssl_conf = openssl_configuration(channel, _TLS_COMMANDS)
    given = {
        "plan-fd": sealed_file("plan", plan.encode()),
        "openssl-conf-fd": sealed_file("openssl.cnf", openssl_conf.encode()),
    }
    if keyd is not None:
        given["keyd-fd"] = keyd.detach()
    sockets = [listener.descriptor for listener in plan.listeners]
    try:
        return _start("parent", _PARENT, given, (*sockets, *plan.indexes))
    finally:
        for index in plan.indexes:
            os.close(index)


def _start(
    name: str,
    program: Sequence[str],
    given: dict[str, int],
    shared: Sequence[int] = (),
) -> Child:
    """Start a Python program. The descriptors in ``given`` are closed here: only it has them."""
    ours, theirs = _socketpair()
    ours.setblocking(False)
    given = given | {"supervisor-fd": theirs.detach()}
    arguments = [word for key, fd in given.items() for word in (f"--{key}", str(fd))]
    try:
        # Only the supervisor tells it to end, so it must not hear signals to the whole unit.
        with signals_held_back():
            process = subprocess.Popen(
                # -I (isolated): PYTHON* variables and the current directory are ignored.
                [sys.executable, "-I", *program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={},
                pass_fds=(*given.values(), *shared),
                # If a parent is killed, the processes that it leaves are known by its session.
                start_new_session=True,
            )
    finally:
        for descriptor in given.values():
            os.close(descriptor)
    return Child(name, process, ours)


def _socketpair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
