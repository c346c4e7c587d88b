"""Connecting to a backend on a worker's behalf, without waiting for it.

Run by the parent. The addresses were resolved by the supervisor; which of them
takes the connection is up to the backends, and so is how long that takes: nothing
here blocks.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress

from titus_py.between.event_loop import READABLE, WRITABLE, EventLoop, Timer
from titus_py.between.plan import ResolvedAddress, address_text

__all__ = ["Dialer", "reset_at_close"]

#: connect(2) on a unix socket whose queue is full fails at once: how soon to try again.
_RETRY_SECONDS = 0.02


class Dialer:
    """One attempt to reach a backend: each of its addresses in turn, until one answers.

    ``done`` is called once: with the connected socket, or with None and the reason.
    """

    def __init__(
        self,
        loop: EventLoop,
        addresses: Sequence[ResolvedAddress],
        timeout: float,
        done: Callable[[socket.socket | None, str], None],
    ) -> None:
        self._loop = loop
        self._left = list(addresses)
        self._done = done
        self._socket: socket.socket | None = None
        self._watched = False
        self._reason = "no address"
        self._retry: Timer | None = None
        self._timeout = loop.after(
            timeout, lambda: self._finish(None, f"no answer in {timeout:g} s")
        )

    def start(self) -> None:
        """Begin; ``done`` may be called before this returns."""
        self._next()

    def cancel(self) -> None:
        """Forget about it: ``done`` is not called any more."""
        self._timeout.cancel()
        if self._retry is not None:
            self._retry.cancel()
        self._drop()

    def _next(self) -> None:
        self._retry = None
        while self._left:
            family, address = self._left[0]
            try:
                attempt = self._socket or socket.socket(family, socket.SOCK_STREAM)
                self._socket = attempt
                attempt.setblocking(False)
                # Python has objections of its own, which it raises.
                outcome = attempt.connect_ex(address)
            except OSError as error:
                self._failed(error.errno)
                continue
            if outcome == errno.EAGAIN:
                self._retry = self._loop.after(_RETRY_SECONDS, self._next)
                return
            if outcome == errno.EINPROGRESS:
                # One on this machine has answered by now.
                outcome = self._outcome(attempt)
            if outcome == errno.EALREADY:
                self._watched = True
                self._loop.watch(attempt.fileno(), self._settled, READABLE | WRITABLE)
                return
            if not outcome:
                self._succeeded()
                return
            self._failed(outcome)
        self._finish(None, self._reason)

    def _outcome(self, attempt: socket.socket) -> int:
        """What connecting has come to, as an errno; EALREADY where that is open.

        By a second connect(2), and not SO_ERROR: it makes the kernel note that there is a
        connection. Until then, whoever holds the socket could connect it to elsewhere once
        it is reset (sendto with MSG_FASTOPEN), and a worker is to hold it.
        """
        return attempt.connect_ex(self._left[0][1])

    def _settled(self) -> None:
        if self._socket is None:
            return
        outcome = self._outcome(self._socket)
        if outcome == errno.EALREADY:
            return
        if outcome:
            self._failed(outcome)
            self._next()
        else:
            self._succeeded()

    def _failed(self, error: int | None) -> None:
        where = address_text(self._left.pop(0)[1])
        self._reason = f"{where}: {os.strerror(error or errno.EIO)}"
        self._drop()

    def _drop(self) -> None:
        if self._socket is not None:
            if self._watched:
                self._loop.unwatch(self._socket.fileno())
                self._watched = False
            self._socket.close()
            self._socket = None

    def _succeeded(self) -> None:
        connected, self._socket = self._socket, None
        if connected is None:
            return
        if self._watched:
            self._loop.unwatch(connected.fileno())
            self._watched = False
        if connected.family != socket.AF_UNIX:
            with suppress(OSError):
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                reset_at_close(connected)
        self._finish(connected, "")

    def _finish(self, connected: socket.socket | None, reason: str) -> None:
        self.cancel()
        self._done(connected, reason)


def reset_at_close(side: socket.socket) -> None:
    """Make the end of whoever holds this a reset of the connection (socket(7), SO_LINGER).

    A worker that is killed must not look like a client, or a backend, that was done.
    """
    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
