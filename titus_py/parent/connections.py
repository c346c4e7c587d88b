"""Connections that have a worker: begun, established, over. Run by the parent.

Of what a worker says, only the two messages of ``between.messages`` are understood here.
"""

import socket
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from keyd.protocol import Operation, Refusal, Status
from titus_py.between import messages
from titus_py.between.event_loop import EventLoop
from titus_py.between.hand_over import give
from titus_py.between.messages import Client, Dial, Ready
from titus_py.between.plan import Plan
from titus_py.between.virtual_host import applies_to
from titus_py.parent.admission import Admission, LimitsHit
from titus_py.parent.backends import Backends
from titus_py.parent.outbox import Tell
from titus_py.parent.worker import Offer, Worker

__all__ = ["Arrival", "Connections"]

#: How much longer than its handshake timeout a worker may take to act on it itself.
_GRACE_SECONDS = 2.0
#: Why one that takes longer still is ended: it was starved of processor time, or is not ours.
_OVERDUE = "did not keep to its handshake timeout"
#: What an honest worker may hear as well: that keyd was too slow, that it was started with other
#: keys than its configuration has, that its OpenSSL has failed.
_NOBODYS_FAULT = (Status.EXPIRED, Status.UNKNOWN_KEY, Status.FAILED)


class Arrival(NamedTuple):
    """A client that nobody serves yet."""

    client: socket.socket
    address: str
    port: int
    local_address: str
    local_port: int
    accepted: float


class Connections:
    """Each is a worker with a client."""

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
        #: By uid: all of them.
        self.busy: dict[int, Worker] = {}
        #: Those whose handshake is not done, the longest-serving first.
        self.handshaking: dict[int, Worker] = {}
        # Unique for as long as the machine runs, whatever is restarted and however the
        # wall clock is set.
        self.next_number = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000
        self.offer = lru_cache(maxsize=1024)(self._offer)

    def begin(
        self, worker: Worker, arrival: Arrival, offer: Offer, sockets: Sequence[socket.socket]
    ) -> None:
        """Give a client to a spare worker: its socket, behind the channel to keyd if it has one."""
        connection = self.next_number
        self.next_number += 1
        self._make_room()
        worker.connection = connection
        worker.address = arrival.address
        worker.client = _text(arrival.address, arrival.port)
        worker.local = _text(arrival.local_address, arrival.local_port)
        worker.offer = offer
        worker.started = time.monotonic()
        worker.deadline = self._loop.after(
            # One that has not asked for its backend by then is not going to.
            self._plan.handshake_timeout + _GRACE_SECONDS,
            lambda: worker.kill(_OVERDUE),
        )
        self.busy[worker.uid] = self.handshaking[worker.uid] = worker
        try:
            give(worker.socket, Client(connection, offer.vhosts).encode(), sockets)
        except OSError as error:
            worker.kill(f"does not take a client: {error.strerror}")
        # With the worker on its way already.
        self._tell(
            "connection_begun",
            connection=connection,
            client=worker.client,
            local=worker.local,
            uid=worker.uid,
        )

    def hear(self, worker: Worker) -> bool:
        """What a worker says; returns whether that is that it is ready for a client."""
        try:
            octets = worker.socket.recv(messages.WORKER_MESSAGE_OCTETS)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            octets = b""
        if not octets:
            # It has hung up, or ended: the pidfd will tell.
            self._loop.unwatch(worker.socket.fileno())
            worker.socket.close()
            return False
        try:
            message = messages.decode_from_worker(octets)
        except messages.Malformed as error:
            self._alarm(worker, "malformed_message", str(error))
            return False
        if isinstance(message, Ready) and not worker.ready:
            worker.ready = True
            return True
        if (
            isinstance(message, Dial)
            and worker.offer is not None
            and worker.dialer is None
            and message.vhost in worker.offer.vhosts
        ):
            self._established(worker, message.vhost)
        else:
            self._alarm(worker, "unexpected_message", str(message))
        return False

    def ended(self, worker: Worker, how: str) -> None:
        """Record it: ``how`` its worker ended where that was not by itself."""
        if worker.dialer is not None:
            worker.dialer.cancel()
        if worker.deadline is not None:
            worker.deadline.cancel()
        self.handshaking.pop(worker.uid, None)
        del self.busy[worker.uid]
        self._admission.leave(worker.address)
        if how and not worker.killed_for:
            level = "alarm"
        else:
            level = "warning" if worker.killed_for == _OVERDUE else "info"
        self._tell(
            "connection_over",
            report=worker.report,
            level=level,
            connection=worker.connection,
            client=worker.client,
            local=worker.local,
            vhost=worker.vhost,
            seconds=round(time.monotonic() - worker.started, 3),
            worker_seconds=round(time.monotonic() - worker.forked, 3),
            end=worker.killed_for or how,
            uid=worker.uid,
        )

    def refused(self, refusal: Refusal) -> None:
        """keyd did not do what a worker asked: it says which connection's that was."""
        worker = next(
            (worker for worker in self.busy.values() if worker.connection == refusal.connection),
            None,
        )
        level = "error" if refusal.status in _NOBODYS_FAULT else "alarm"
        self._tell(
            "keyd_refused",
            level=level,
            connection=refusal.connection,
            client=worker.client if worker else None,
            uid=worker.uid if worker else None,
            status=refusal.status.name.lower(),
            attempted=refusal.detail,
        )

    def _make_room(self) -> None:
        """With too many in their handshake, the slowest of them is ended."""
        if len(self.handshaking) >= self._plan.limits.handshakes:
            # Off the list now, and not when it has ended: the next newcomer ends the next one.
            slowest = self.handshaking.pop(next(iter(self.handshaking)))
            slowest.kill("handshakes_limit")
            self._limits_hit.note("handshakes", slowest.address)

    def _established(self, worker: Worker, vhost: int) -> None:
        """The handshake is done, as the worker says: connect it to that host's backend."""
        worker.vhost = vhost
        self.handshaking.pop(worker.uid, None)
        if worker.deadline is not None:
            worker.deadline.cancel()
        if self._plan.limits.lifetime is not None:
            worker.deadline = self._loop.after(
                self._plan.limits.lifetime, lambda: worker.kill("lifetime")
            )
        self._backends.dial(worker, vhost)

    def _alarm(self, worker: Worker, event: str, attempted: str) -> None:
        """A worker did what our code does not do: say so, once, and end it."""
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
        grants: dict[bytes, frozenset[Operation]] = {}
        for number in vhosts:
            vhost = self._plan.vhosts[number]
            operations = {Operation.SIGN}
            if vhost.tls.rsa_key_exchange:
                operations.add(Operation.DECRYPT)
            key = bytes.fromhex(vhost.key)
            grants[key] = grants.get(key, frozenset()) | operations
        return Offer(vhosts, grants)


def _text(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
