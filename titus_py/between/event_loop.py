"""Descriptors and timers: what the supervisor and the parent wait for.

Run by both. Callbacks must not block.
"""

import heapq
import itertools
import select
import time
from collections.abc import Callable

__all__ = ["EventLoop", "Timer"]

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT


class Timer:
    """A call to come; ``cancel`` forgets it."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class EventLoop:
    """One epoll(7) and a heap of timers, all on CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], object]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def watch(
        self, descriptor: int, callback: Callable[[], object], events: int = READABLE
    ) -> None:
        """Call back whenever the descriptor is ready, until ``unwatch``."""
        self._epoll.register(descriptor, events)
        self._callbacks[descriptor] = callback

    def unwatch(self, descriptor: int) -> None:
        """Call back no more. Must be called before the descriptor is closed."""
        del self._callbacks[descriptor]
        self._epoll.unregister(descriptor)

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call back once, after so many seconds."""
        timer = Timer(callback)
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
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                callback()

    def _timeout(self) -> float | None:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - time.monotonic())
