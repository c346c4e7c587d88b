"""The addresses of each backend, and connecting to it when a worker asks.

Run by the parent. The supervisor says where backends are; the worker only says which virtual
host its client asked for, and which of that host's protocols it negotiated.
"""

import errno
import socket

from titus_py.between import messages
from titus_py.between.event_loop import EventLoop
from titus_py.between.hand_over import give
from titus_py.between.messages import Dial
from titus_py.between.plan import Plan, ResolvedAddress
from titus_py.parent.dialer import Dialer
from titus_py.parent.outbox import Tell
from titus_py.parent.worker import Worker

__all__ = ["Backends"]


class Backends:
    def __init__(self, loop: EventLoop, plan: Plan, tell: Tell) -> None:
        self._loop = loop
        self._plan = plan
        self._tell = tell
        self._addresses = plan.addresses.copy()
        if any(vhost.send_proxy for vhost in plan.vhosts):
            # Others do not need it in their memory.
            from titus_py.parent.introduction import introduce

            self._introduce = introduce

    def move(self, backend: str, addresses: tuple[ResolvedAddress, ...]) -> None:
        """From now on, connect to these addresses for this backend."""
        self._addresses[backend] = addresses

    def dial(self, worker: Worker, dial: Dial) -> None:
        """Connect, without waiting. The worker gets the socket, or the reason for having none."""
        vhost = self._plan.vhosts[dial.vhost]
        name = vhost.backend_for(worker.protocol)

        def done(backend: socket.socket | None, reason: str) -> None:
            if backend is not None and vhost.send_proxy is not None:
                protocol = worker.protocol if vhost.passes_tls_facts else None
                reason = self._introduce(
                    backend, vhost.send_proxy, worker.ends, dial.facts, protocol
                )
                if reason:
                    backend.close()
                    backend = None
            self._answer(worker, backend, reason)
            if backend is None:
                self._tell(
                    "backend_unavailable",
                    level="error",
                    connection=worker.connection,
                    backend=name,
                    reason=reason,
                )

        timeout, keepalive = self._plan.connect_timeout, self._plan.limits.keepalive
        worker.dialer = Dialer(self._loop, self._addresses[name], timeout, keepalive, done)
        worker.dialer.start()

    def _answer(self, worker: Worker, backend: socket.socket | None, reason: str) -> None:
        try:
            if backend is None:
                why = reason.encode(errors="replace")[:255]
                worker.socket.send(messages.BACKEND_FAILED + why)
            else:
                give(worker.socket, messages.BACKEND, [backend])
        except OSError as error:
            # The worker may have ended meanwhile. Its end is recorded when its pidfd tells of it.
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EBADF):
                worker.kill(f"does not take its backend: {error.strerror}")
