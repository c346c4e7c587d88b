"""Connecting to one of several backends, without waiting for any. Run by the parent."""

import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from titus_py.between.event_loop import EventLoop
from titus_py.parent.backend import Backend
from titus_py.parent.dialer import Dialer

if TYPE_CHECKING:
    from titus_py.parent.source import Bind

__all__ = ["Failover"]


class Failover:
    """Connects to the first of these backends that answers, in this order.

    Each gets its share of the ``timeout`` (in seconds) that is left, and the next one its turn as
    soon as it has failed. ``keepalive`` and ``bind`` are as in ``Dialer``. ``done`` is called once:
    with the socket and its backend, or with the reason why there is none.
    """

    def __init__(
        self,
        loop: EventLoop,
        backends: Sequence[Backend],
        timeout: float,
        keepalive: float,
        done: Callable[[socket.SocketType | None, Backend | None, str], None],
        bind: "Bind | None" = None,
    ) -> None:
        self._loop = loop
        self._left = deque(backends)
        self._one_of_several = len(backends) > 1
        self._until = time.monotonic() + timeout
        self._keepalive = keepalive
        self._done = done
        self._bind = bind
        self._dialer: Dialer | None = None
        self._failures: list[str] = []

    def start(self) -> None:
        """Begin; ``done`` may be called before this returns."""
        if not self._left:
            self._done(None, None, "; ".join(self._failures))
            return
        share = round(max(0.0, self._until - time.monotonic()) / len(self._left), 3)
        backend = self._left.popleft()
        self._dialer = Dialer(
            self._loop,
            backend.addresses,
            share,
            self._keepalive,
            partial(self._settled, backend),
            self._bind,
        )
        self._dialer.start()

    def cancel(self) -> None:
        """Forget about it: ``done`` is not called any more."""
        if self._dialer is not None:
            self._dialer.cancel()

    def _settled(self, backend: Backend, connected: socket.SocketType | None, reason: str) -> None:
        # Each has the other: together, they would be garbage that only the collector frees.
        dialer, self._dialer = self._dialer, None
        if connected is not None:
            backend.worked()
            self._done(connected, backend, "")
            return
        if dialer is not None and not dialer.failed_here:
            backend.failed()
        if self._one_of_several and not reason.startswith(backend.name):
            reason = f"{backend.name}: {reason}"
        self._failures.append(reason)
        self.start()
