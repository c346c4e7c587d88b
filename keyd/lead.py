"""One thread at a time waits for events, and handles those that are quick.

Used by keyd's threads. Where each takes what comes next, they wait for Python's lock and wake each
other, again and again for one request. So whoever has the lead keeps it, until something takes long
that others can run beside.

To wake another thread costs a third of an RSA signature. So nobody is woken while nobody has to
wait for a signature anyway. That costs one event the time of one signature, ten times a second at
most.
"""

import select
import threading
import time

__all__ = ["Lead"]

#: In seconds: for how long others are woken once an event has had to wait.
_CROWDED_SECONDS = 0.1


class Lead:
    """Of at most one thread; ``events`` is what it waits for."""

    def __init__(self, events: select.epoll) -> None:
        self._lock = threading.Lock()
        self._leader = 0
        # Not by an epoll(7) of its own: the kernel has one lock for whatever is added to an epoll
        # that another one has, and any user can hold that for long.
        self._waiting = select.poll()
        self._waiting.register(events, select.POLLIN)
        self._crowded_until = time.monotonic()
        #: Whether the leader has begun what takes long, and kept the lead.
        self._kept = False

    def take(self, seconds: float) -> bool:
        """Wait for the lead, so long at most; returns whether this thread has it now."""
        taken = self._lock.acquire(timeout=seconds)
        if taken:
            self._leader = threading.get_ident()
        return taken

    @property
    def held(self) -> bool:
        """Whether this thread has it."""
        return self._leader == threading.get_ident()

    def make_way(self) -> None:
        """Let another thread have it, if this one does and events may have to wait: for a signature
        that takes long, a millisecond or so."""
        if time.monotonic() < self._crowded_until:
            self.hand_over()
        elif self.held:
            self._kept = True

    def look_back(self) -> None:
        """By the leader, after each event: see whether others have had to wait for it."""
        if self._kept:
            self._kept = False
            if self._waiting.poll(0):
                self._crowded_until = time.monotonic() + _CROWDED_SECONDS

    def hand_over(self) -> None:
        """Let another thread have it, if this one does: what comes next may take very long."""
        if self.held:
            self._leader = 0
            self._lock.release()
