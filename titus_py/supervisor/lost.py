"""Processes that are lost, and wait for the program that is installed to start them.

Run by the supervisor, after an upgrade. That program may not start: the package is broken, or dpkg
is still putting its files in place. Then what serves goes on, and the attempts go on as well. A
restart would need the same program. So it is not tried while any connection would end by it: the
supervisor ends only once it has no parent left.
"""

import sys
import time
from collections.abc import Callable

from titus_py.between.event_loop import EventLoop, Timer
from titus_py.supervisor.generations import Generations
from titus_py.supervisor.record import Event
from titus_py.supervisor.service import Service

__all__ = ["Lost"]

#: How soon to try the program again; each time, the pause doubles.
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
#: From when on it counts as broken, and not as being replaced; and when to end if nothing serves.
_BROKEN_SECONDS, _END_SECONDS = 10.0, 30.0
_ADVICE = "install the package anew: what is lost is then started, and connections go on"


class Lost:
    """``try_again`` has the installed program tried; ``settle`` is called with the outcome."""

    def __init__(
        self,
        loop: EventLoop,
        event: Event,
        service: Service,
        generations: Generations,
        try_again: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self._event = event
        self._service = service
        self._generations = generations
        self._try_again = try_again
        self._clock = clock
        #: What starts each of them, if no other program does it instead.
        self._starts: dict[str, Callable[[], None]] = {}
        #: Why the installed program cannot start; "" if it can, or was not tried yet.
        self.reason = ""
        #: Since when it cannot, and why as the log has it.
        self._since: float | None = None
        self._told = ""
        self._pause = _PAUSE_SECONDS
        self._next: Timer | None = None

    def __bool__(self) -> bool:
        return bool(self._starts)

    @property
    def names(self) -> str:
        return " and ".join(sorted(self._starts))

    def add(self, name: str, start: Callable[[], None]) -> bool:
        """Returns whether it is one more: then the installed program is to be tried now."""
        new = name not in self._starts
        self._starts[name] = start
        return new

    def settle(self, reason: str) -> None:
        """The installed program cannot start, for this ``reason``, or ("") does not take over.

        If it can start but does not take over, what is lost is started from its files.
        """
        self.reason = reason if self._starts else ""
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if not self.reason:
            self._since, self._told, self._pause = None, "", _PAUSE_SECONDS
            starts, self._starts = self._starts, {}
            for start in starts.values():
                start()
            return
        now = self._clock()
        self._since = now if self._since is None else self._since
        if now - self._since >= _BROKEN_SECONDS:
            self._tell()
        if now - self._since >= _END_SECONDS and not self._generations.parents:
            why = f"lost: {self.names}; {reason}"
            self._event("giving_up", level="alarm", reason=why)
            self._service.give_up(why)
            return
        self._service.tell_status()
        self._next = self._loop.after(self._pause, self._again)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)

    def _again(self) -> None:
        self._next = None
        self._try_again()

    def _tell(self) -> None:
        told = f"{self.names}: {self.reason}"
        if told == self._told:
            return
        self._told = told
        self._event(
            "program_broken",
            level="alarm",
            lost=self.names,
            reason=self.reason,
            program=sys.executable,
            advice=_ADVICE,
        )
