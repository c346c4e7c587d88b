"""The backends, and connecting to one of a virtual host's when a worker asks.

Run by the parent. The supervisor says where backends are; the worker only says which virtual
host its client asked for, and which of that host's protocols it negotiated.
"""

import errno
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from titus_py.between import messages
from titus_py.between.event_loop import EventLoop
from titus_py.between.hand_over import give
from titus_py.between.messages import Dial, Ends
from titus_py.between.plan import Plan, ResolvedAddress, address_text
from titus_py.parent.backend import Backend
from titus_py.parent.balance import Balance
from titus_py.parent.failover import Failover
from titus_py.parent.outbox import Tell
from titus_py.parent.worker import Worker

if TYPE_CHECKING:
    from titus_py.parent.health import Checks

__all__ = ["Backends"]


class Backends:
    def __init__(self, loop: EventLoop, plan: Plan, tell: Tell) -> None:
        self._loop = loop
        self._plan = plan
        self._tell = tell
        states = dict(zip(plan.checks, plan.states, strict=True))
        #: By name, and how they are checked.
        self._backends = {
            (name, check): Backend(name, known, check, states[check] if check else None)
            for name, known in plan.addresses.items()
            for check in (None, *(one for one in plan.checks if one.backend == name))
        }
        #: By virtual host, and the names of those of its backends that a protocol or a client has.
        self._balances = {
            (number, names): Balance(
                vhost.balance, [self._backends[name, vhost.check(name)] for name in names]
            )
            for number, vhost in enumerate(plan.vhosts)
            for names in vhost.all_backends
        }
        self._checks: Checks | None = None
        if plan.checks:
            # Others do not need it in their memory.
            from titus_py.parent import health

            checked = [self._backends[check.backend, check] for check in plan.checks]
            self._checks = health.Checks(loop, checked, tell)
        if any(vhost.send_proxy for vhost in plan.vhosts):
            from titus_py.parent.introduction import introduce

            self._introduce = introduce
        #: For the end of a backend that cannot be given away.
        self._without_waiting: Callable[[], AbstractContextManager[None]] = nullcontext
        if plan.connects_to_unix_sockets:
            # Others do not need it in their memory.
            from titus_py.between.closing import without_waiting

            self._without_waiting = without_waiting
        if plan.binds_clients_addresses:
            from titus_py.parent.source import from_address

            self._from_address = from_address

    def balance(self, how: str, names: tuple[str, ...]) -> Balance:
        """The order in which a tunnel tries these, which are not checked."""
        return Balance(how, [self._backends[name, None] for name in names])

    def move(self, backend: str, addresses: tuple[ResolvedAddress, ...]) -> None:
        """From now on, connect to these addresses for this backend."""
        for (name, _), one in self._backends.items():
            if name == backend:
                one.addresses = addresses

    def retire(self) -> None:
        """Check no more: another parent takes the clients that come, and checks."""
        if self._checks is not None:
            self._checks.stop()

    def dial(self, worker: Worker, dial: Dial) -> None:
        """Connect, without waiting. The worker gets the socket, or the reason for having none."""
        vhost = self._plan.vhosts[dial.vhost]
        names = vhost.backend_for(worker.protocol, worker.known)
        balance = self._balances[dial.vhost, names]
        bind = None
        if vhost.source_address == "client":
            bind = self._from_address(worker.ends.client)

        def done(connected: socket.SocketType | None, backend: Backend | None, reason: str) -> None:
            # It has this function, which has the worker: they would be garbage for the collector.
            worker.dialer = None
            if connected is not None and vhost.send_proxy is not None:
                reason = self._introduce(
                    connected,
                    vhost.send_proxy,
                    worker.ends,
                    dial.facts,
                    worker.protocol,
                    worker.identity,
                    vhost.name_of(worker.known),
                )
                if reason:
                    with self._without_waiting():
                        connected.close()
                    connected = None
            if connected is not None and backend is not None:
                self.assign(worker, connected, backend)
                if bind is not None:
                    worker.source = address_text(connected.getsockname())
            self._answer(worker, connected, reason)
            if connected is None:
                self._tell(
                    "backend_unavailable",
                    level="error",
                    connection=worker.connection,
                    backend=", ".join(names),
                    reason=reason,
                )

        timeout, keepalive = self._plan.connect_timeout, self._plan.limits.keepalive
        backends = balance.order(worker.ends.client)
        if not backends:
            down = (f"{one.name}: {one.state.reason}" for one in balance.backends if one.state)
            done(None, None, f"every backend is down: {'; '.join(down)}")
            return
        worker.dialer = Failover(self._loop, backends, timeout, keepalive, done, bind)
        worker.dialer.start()

    def assign(self, worker: Worker, connected: socket.SocketType, backend: Backend) -> None:
        """Note which backend a worker is about to get."""
        worker.backend = backend
        worker.backend_ends = _ends(connected)
        backend.connections += 1

    def ended(self, worker: Worker) -> None:
        """Forget a worker that has ended."""
        if worker.dialer is not None:
            worker.dialer.cancel()
        if worker.backend is not None:
            worker.backend.connections -= 1

    def chosen(self, worker: Worker) -> str | None:
        """Which of its virtual host's, or its tunnel's, backends a worker has, if of several."""
        if worker.backend is None:
            return None
        if worker.tunnel is not None:
            names = self._plan.tunnels[worker.tunnel].connect
        elif worker.vhost is not None:
            names = self._plan.vhosts[worker.vhost].backend_for(worker.protocol, worker.known)
        else:
            return None
        return worker.backend.name if len(names) > 1 else None

    def _answer(self, worker: Worker, connected: socket.SocketType | None, reason: str) -> None:
        try:
            if connected is None:
                why = reason.encode(errors="replace")[:255]
                worker.socket.send(messages.BACKEND_FAILED + why)
            else:
                with self._without_waiting():
                    give(worker.socket, messages.BACKEND, [connected])
        except OSError as error:
            # The worker may have ended meanwhile. Its end is recorded when its pidfd tells of it.
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EBADF):
                worker.kill(f"does not take its backend: {error.strerror}")


def _ends(connected: socket.SocketType) -> Ends | None:
    """For the kernel to find this connection by, once the worker alone has it."""
    try:
        backend, here = connected.getpeername(), connected.getsockname()
    except OSError:
        # The backend has reset it already.
        return None
    if not isinstance(backend, tuple):
        return None
    # The kernel knows a link-local address with its interface only (ipv6(7), sin6_scope_id).
    interface = f"%{backend[3]}" if len(backend) > 2 and backend[3] else ""
    return Ends(backend[0] + interface, backend[1], *here[:2])
