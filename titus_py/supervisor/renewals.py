"""A new fork server before an attacker has learned the memory layout of this one.

Run by the supervisor. All workers of one fork server have its layout, stack canary and hash seed,
and so an attacker who makes workers crash learns a little from each. A new generation of the same
configuration has others. Connections go on.
"""

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from titus_py.between.event_loop import EventLoop
from titus_py.supervisor.record import Event

__all__ = ["Renewals", "Replace"]

#: So many workers with a client have to be killed within so long.
_DEATHS, _DEATHS_SECONDS = 3, 60.0
#: What wrong guesses end in. SIGKILL may be the kernel's, out of memory, or an administrator's.
_SIGNALS = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT", "SIGTRAP", "SIGSYS")
_ENDS = frozenset(f"killed by {signal}" for signal in _SIGNALS)
#: How long to wait, at least, from one to the next; and after how long without one to begin anew.
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, _QUIET_SECONDS = 15.0, 300.0, 3600.0
_DAY_SECONDS = 86_400.0
#: How soon to try the daily renewal again, if a reload, for one, did not allow it. The pause
#: doubles with each attempt.
_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 60.0, 3600.0
#: The same while workers crash. The pause doubles with each attempt: each has processes started.
_URGENT_RETRY_SECONDS, _LONGEST_URGENT_RETRY_SECONDS = 2.0, 300.0


class Replace(Protocol):
    """Replaces the generation that serves by one with the same configuration."""

    def __call__(self, over: Callable[[bool], None], urgently: int | None = None) -> None:
        """Begin; ``over`` is called with whether it was replaced, at once if it cannot be now.

        ``urgently``: only the generation of this number, and whatever is in the way has to go.
        Nothing is done, and ``over`` is not called, if another one serves by now.
        """


class Renewals:
    """``worker_ended`` is to be called for the workers of the generation that serves."""

    def __init__(
        self,
        loop: EventLoop,
        event: Event,
        replace: Replace,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self._event = event
        self._replace = replace
        self._clock = clock
        #: When the last workers were killed.
        self._deaths: deque[float] = deque(maxlen=_DEATHS)
        self._pause = _SHORTEST_PAUSE_SECONDS
        self._last = -_QUIET_SECONDS
        #: The generation that is being replaced because of crashes, if one is.
        self._urgent: int | None = None
        self._loop.after(_DAY_SECONDS, self._daily)

    def worker_ended(self, end: str, generation: int) -> None:
        """A worker of the generation that serves has ended, which had a client."""
        if end not in _ENDS or generation == self._urgent:
            return
        now = self._clock()
        self._deaths.append(now)
        if len(self._deaths) < _DEATHS or now - self._deaths[0] > _DEATHS_SECONDS:
            return
        if now - self._last > _QUIET_SECONDS:
            self._pause = _SHORTEST_PAUSE_SECONDS
        elif now - self._last < self._pause:
            return
        else:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        # Not now: the event that says so is still being heard.
        self._last, self._urgent = now, generation
        self._deaths.clear()
        reason = f"{_DEATHS} workers within a minute, the last one {end}"
        self._loop.after(0, partial(self._after_deaths, reason, generation))

    def _daily(self, pause: float = _RETRY_SECONDS) -> None:
        def over(replaced: bool) -> None:
            if replaced:
                self._event("fork_server_replaced", level="info", reason="once a day")
                self._loop.after(_DAY_SECONDS, self._daily)
            else:
                longer = min(2 * pause, _LONGEST_RETRY_SECONDS)
                self._loop.after(pause, partial(self._daily, longer))

        self._replace(over)

    def _after_deaths(
        self, reason: str, generation: int, pause: float = _URGENT_RETRY_SECONDS
    ) -> None:
        """Try until that generation no longer serves: an attacker knows part of its layout."""

        def over(replaced: bool) -> None:
            if replaced:
                self._urgent = None
                self._event("fork_server_replaced", level="warning", reason=reason)
                return
            longer = min(2 * pause, _LONGEST_URGENT_RETRY_SECONDS)
            again = partial(self._after_deaths, reason, generation, longer)
            self._loop.after(pause, again)

        self._replace(over, urgently=generation)
