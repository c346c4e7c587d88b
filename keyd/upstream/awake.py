"""Since when keyd has not been stopped: that nobody was heard before says nothing of anybody.

Used where keys are lent, and where they are borrowed. A process that was stopped (SIGSTOP, a paused
virtual machine) finds that the clock has gone on, and unread what the other end has said meanwhile.
Where it never has its time on a processor, nobody is ever silent for too long.
"""

__all__ = ["Awake"]

#: Between two looks at the clock: one second or two, unless this process was stopped.
_LATE_SECONDS = 2.5


class Awake:
    def __init__(self, now: float) -> None:
        self._looked = now
        #: When it first looked after it was stopped for the last time.
        self.since = 0.0

    def look(self, now: float) -> None:
        """To be called about once a second."""
        if now - self._looked > _LATE_SECONDS:
            self.since = now
        self._looked = now
