"""Connecting to a backend on a worker's behalf, without waiting for it.

Run by the parent. The supervisor has resolved the addresses. Which of them accepts the
connection, and how long that takes, is up to the backends, so nothing here blocks.
"""

import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from keyd.linux.unix_socket import refuse_descriptors
from titus_py.between.event_loop import READABLE, WRITABLE, EventLoop, Timer
from titus_py.between.plan import ResolvedAddress, SocketAddress, address_text
from titus_py.parent.keepalive import keep_alive

if TYPE_CHECKING:
    from titus_py.parent.source import Bind

__all__ = ["MAX_ATTEMPTS", "Dialer", "reset_at_close"]

#: How long an attempt is on its own before the next one begins beside it (RFC 8305 §5).
_ATTEMPT_SECONDS = 0.25
#: How many attempts run at a time, each with a descriptor. When one more begins, the oldest is
#: given up. Unless others failed sooner, it has had 1.25 s, and so a second SYN, which is sent
#: after 1 s (RFC 6298 §2).
MAX_ATTEMPTS = 5
#: How soon to try a unix socket again whose queue is full: connect(2) then fails at once. The pause
#: doubles up to the latter: hundreds of clients may wait for a backend that hangs, and are not to
#: take all of this process's time.
_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 0.02, 0.5
#: Failures that say nothing of the backend: no descriptor, memory, watch (epoll_ctl(2)) or port was
#: left here.
_RESOURCES = frozenset(
    {
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.EADDRNOTAVAIL,
    }
)
#: How many failures the reason names: the latest ones.
_NAMED_FAILURES = 4


class Dialer:
    """Connects to the first of a backend's addresses that answers (RFC 8305).

    The next address is tried when the one before it has failed, or has not answered soon. The
    earlier one may still answer first. ``keepalive`` is how many seconds of silence come before
    the first probe; 0 is no keepalive. ``done`` is called once: with the connected socket, or with
    None and the reason. ``bind`` gives each socket its own address (``source``); None: the system.
    """

    def __init__(
        self,
        loop: EventLoop,
        addresses: Iterable[ResolvedAddress],
        timeout: float,
        keepalive: float,
        done: Callable[[socket.SocketType | None, str], None],
        bind: "Bind | None" = None,
    ) -> None:
        self._loop = loop
        self._left = deque(addresses)
        self._keepalive = keepalive
        self._done = done
        self._bind = bind
        #: The attempts that are under way, the oldest first.
        self._attempts: dict[socket.SocketType, SocketAddress] = {}
        self._failures: deque[str] = deque(maxlen=_NAMED_FAILURES)
        self._next_attempt: Timer | None = None
        self._pause = _RETRY_SECONDS
        #: An attempt has failed for a reason on this side, which says nothing of the backend.
        self.failed_here = False
        self._seconds = timeout
        #: While there is nothing but to wait.
        self._timeout: Timer | None = None

    def start(self) -> None:
        """Begin; ``done`` may be called before this returns."""
        self._next()
        if self._attempts or self._next_attempt is not None:
            why = f"no answer in {self._seconds:g} s"
            self._timeout = self._loop.after(self._seconds, lambda: self._give_up(why))

    def cancel(self) -> None:
        """Forget about it: ``done`` is not called any more."""
        if self._timeout is not None:
            self._timeout.cancel()
        self._stop_waiting()
        for attempt in list(self._attempts):
            self._release(attempt)
            attempt.close()

    def _next(self) -> None:
        """Try the next address, and those after it for as long as they fail at once."""
        self._stop_waiting()
        while self._left:
            family, address = self._left.popleft()
            outcome = self._try(family, address)
            if not outcome:
                return
            if outcome == errno.EAGAIN:
                self._left.appendleft((family, address))
                self._next_attempt = self._loop.after(self._pause, self._next)
                self._pause = min(2 * self._pause, _LONGEST_RETRY_SECONDS)
                return
            if outcome == errno.EALREADY:
                if self._left:
                    self._next_attempt = self._loop.after(_ATTEMPT_SECONDS, self._next)
                return
        if not self._attempts:
            self._give_up("" if self._failures else "no address")

    def _try(self, family: int, address: SocketAddress) -> int:
        """Begin an attempt; returns its outcome as an errno, EALREADY if it is under way."""
        try:
            attempt = socket.SocketType(family, socket.SOCK_STREAM)
        except OSError as error:
            outcome = error.errno or errno.EIO
            self._failed(address, outcome)
            return outcome
        if self._bind is not None and (problem := self._bind(attempt, address)):
            attempt.close()
            self.failed_here = True
            self._failures.append(f"{address_text(address)}: {problem}")
            return errno.EADDRNOTAVAIL
        attempt.setblocking(False)
        if family == socket.AF_UNIX:
            # What a backend sends with its octets, whoever closes it last may have to wait for.
            refuse_descriptors(attempt)
        try:
            outcome = attempt.connect_ex(address)
        except OSError as error:
            # Python itself rejects some addresses.
            outcome = error.errno or errno.EIO
        if outcome == errno.EINPROGRESS:
            # A backend on this machine has answered by now.
            outcome = self._outcome(attempt, address)
        if not outcome:
            self._succeeded(attempt)
        elif outcome == errno.EALREADY:
            outcome = self._watch(attempt, address)
        else:
            attempt.close()
            if outcome != errno.EAGAIN:
                self._failed(address, outcome)
        return outcome

    def _outcome(self, attempt: socket.SocketType, address: SocketAddress) -> int:
        """An attempt's outcome as an errno; EALREADY while it is under way.

        Asked by a second connect(2), not by SO_ERROR: only connect(2) makes the kernel note that
        there is a connection. Without that, the worker that gets the socket could connect it to
        another address once it is reset (sendto with MSG_FASTOPEN).
        """
        return attempt.connect_ex(address)

    def _watch(self, attempt: socket.SocketType, address: SocketAddress) -> int:
        """Wait for an attempt; returns EALREADY, or the errno with which that cannot be."""
        if len(self._attempts) == MAX_ATTEMPTS:
            longest = next(iter(self._attempts))
            self._failed(self._release(longest), errno.ETIMEDOUT)
            longest.close()
        try:
            self._loop.watch(attempt.fileno(), partial(self._settled, attempt), READABLE | WRITABLE)
        except OSError as error:
            attempt.close()
            problem = error.errno or errno.ENOMEM
            self._failed(address, problem)
            return problem
        self._attempts[attempt] = address
        return errno.EALREADY

    def _settled(self, attempt: socket.SocketType) -> None:
        outcome = self._outcome(attempt, self._attempts[attempt])
        if outcome == errno.EALREADY:
            return
        address = self._release(attempt)
        if outcome:
            attempt.close()
            self._failed(address, outcome)
            self._next()
        else:
            self._succeeded(attempt)

    def _release(self, attempt: socket.SocketType) -> SocketAddress:
        """Stop waiting for an attempt; returns its address."""
        self._loop.unwatch(attempt.fileno())
        return self._attempts.pop(attempt)

    def _failed(self, address: SocketAddress, error: int) -> None:
        self.failed_here |= error in _RESOURCES
        self._failures.append(f"{address_text(address)}: {os.strerror(error)}")

    def _stop_waiting(self) -> None:
        if self._next_attempt is not None:
            self._next_attempt.cancel()
            self._next_attempt = None

    def _succeeded(self, connected: socket.SocketType) -> None:
        if connected.family != socket.AF_UNIX:
            with suppress(OSError):
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                keep_alive(connected, self._keepalive)
                reset_at_close(connected)
        self.cancel()
        self._done(connected, "")

    def _give_up(self, why: str) -> None:
        self.cancel()
        self._done(None, "; ".join(filter(None, (*self._failures, why))))


def reset_at_close(side: socket.SocketType) -> None:
    """Make the connection end in a reset when its last holder ends (socket(7), SO_LINGER).

    When a worker is killed, neither peer may take that for the other one's clean end.
    """
    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
