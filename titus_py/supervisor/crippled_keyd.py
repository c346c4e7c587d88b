"""Another keyd where the one that serves has lost a process that it cannot start again.

Run by the supervisor. Such a process connects to upstreams, or minds a token. keyd starts it before
it confines itself. A new generation of the same configuration has a keyd with another. Connections
go on.
"""

import time
from collections.abc import Callable
from functools import partial

from titus_py.between.event_loop import EventLoop
from titus_py.supervisor.renewals import Replace

__all__ = ["CrippledKeyd"]

#: How long to wait, at least, from one to the next: what ends again and again is not to have all
#: processes started all the time. After an hour without one, it begins anew.
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, _QUIET_SECONDS = 15.0, 300.0, 3600.0
#: How soon to try again if a reload, for one, is in the way. The pause doubles with each attempt.
_RETRY_SECONDS = 2.0


class CrippledKeyd:
    def __init__(
        self, loop: EventLoop, replace: Replace, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._loop = loop
        self._replace = replace
        self._clock = clock
        #: The last generation that was, or is to be, replaced.
        self._generation = 0
        self._last = -_QUIET_SECONDS
        self._pause = 0.0

    def replace(self, generation: int) -> None:
        """Replace the generation of this number, unless another one serves by then."""
        if generation == self._generation:
            return
        self._generation = generation
        now = self._clock()
        if now - self._last >= _QUIET_SECONDS:
            self._pause = 0.0
        due = max(now, self._last + self._pause)
        self._last = due
        self._pause = min(max(_SHORTEST_PAUSE_SECONDS, 2 * self._pause), _LONGEST_PAUSE_SECONDS)
        self._loop.after(due - now, partial(self._try, generation))

    def _try(self, generation: int, pause: float = _RETRY_SECONDS) -> None:
        def over(replaced: bool) -> None:
            if not replaced:
                again = partial(self._try, generation, min(2 * pause, _LONGEST_PAUSE_SECONDS))
                self._loop.after(pause, again)

        self._replace(over, urgently=generation)
