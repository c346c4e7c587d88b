"""Descriptors and timers: what the supervisor and the parent wait for.

Run by both. Callbacks must not block.
"""

import heapq
import itertools
import select
import time
from collections.abc import Callable

__all__ = ["READABLE", "WRITABLE", "EventLoop", "Timer"]

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
#: So many cancelled timers may be kept in any case.
_FEW_TIMERS = 1000


class Timer:
    """A call to come; ``cancel`` forgets it."""

    __slots__ = ("_cancelled", "callback")

    def __init__(
        self, callback: Callable[[], None], cancelled: Callable[[], object] = lambda: None
    ) -> None:
        self.callback: Callable[[], None] | None = callback
        self._cancelled = cancelled

    def cancel(self) -> None:
        if self.callback is not None:
            self.callback = None
            self._cancelled()


class EventLoop:
    """One epoll(7) and a heap of timers, all on CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], object]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        #: How many of the timers are cancelled, at most: some of them may be gone already.
        self._cancelled = 0

    def watch(
        self, descriptor: int, callback: Callable[[], object], events: int = READABLE
    ) -> None:
        """Call back whenever the descriptor is ready, until ``unwatch``."""
        self._epoll.register(descriptor, events)
        self._callbacks[descriptor] = callback

    def rewatch(
        self, descriptor: int, callback: Callable[[], object], events: int = READABLE
    ) -> None:
        """Call back otherwise from now on. This does not fail for lack of memory or of watches."""
        self._epoll.modify(descriptor, events)
        self._callbacks[descriptor] = callback

    def unwatch(self, descriptor: int) -> None:
        """Call back no more. Must be called before the descriptor is closed."""
        del self._callbacks[descriptor]
        self._epoll.unregister(descriptor)

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call back once, after so many seconds."""
        timer = Timer(callback, self._forget_cancelled)
        due = time.monotonic() + seconds
        heapq.heappush(self._timers, (due, next(self._order), timer))
        return timer

    def run_once(self, wait: bool = True) -> None:
        """Wait for a descriptor or a timer, if ``wait``; then make all calls that are due."""
        ready = self._epoll.poll(self._timeout() if wait else 0)
        due = [(descriptor, self._callbacks.get(descriptor)) for descriptor, _ in ready]
        for descriptor, callback in due:
            # An earlier callback of this round may have unwatched this descriptor, and opened
            # another one with the same number.
            if callback is not None and self._callbacks.get(descriptor) is callback:
                callback()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()

    def _forget_cancelled(self) -> None:
        """Called for each timer that is cancelled. One for a day would be kept for a day."""
        self._cancelled += 1
        if self._cancelled > max(_FEW_TIMERS, len(self._timers) // 2):
            self._timers = [entry for entry in self._timers if entry[2].callback is not None]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def _timeout(self) -> float | None:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - time.monotonic())
