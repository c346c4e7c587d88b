"""One thread at a time waits for events, and handles those that are quick.

Used by keyd's threads. Where each takes what comes next, they wait for Python's lock and wake each
other, again and again for one request. So whoever has the lead keeps it, until something takes long
that others can run beside.

To wake another thread costs a third of an RSA signature: often it takes the processor from the one
that is about to sign, only to wait for Python's lock. So nobody is woken while nobody has to wait
for a signature anyway. That costs one event the time of one signature, ten times a second at most.
And whoever has signed meanwhile waits for one event beside the leader. If that takes long, too,
there is nobody to be woken.
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
        #: Who may wait for one event without it.
        self._beside: set[int] = set()
        self._events = events
        self._crowded_until = time.monotonic()
        #: Whether the leader has kept the lead while something took long.
        self._kept = False

    def take(self, seconds: float) -> bool:
        """Wait for the lead, so long at most; returns whether this thread has it now."""
        taken = self._lock.acquire(timeout=seconds)
        if taken:
            self._leader = threading.get_ident()
        return taken

    @property
    def held(self) -> bool:
        """Whether this thread has it, or may wait for an event beside whoever has."""
        thread = threading.get_ident()
        return self._leader == thread or thread in self._beside

    def next_event(self, seconds: float) -> list[tuple[int, int]]:
        """By one who may: the next event, if there is one within this time."""
        self._beside.discard(threading.get_ident())
        if self._kept:
            self._kept = False
            if waiting := self._events.poll(0, 1):
                self._crowded_until = time.monotonic() + _CROWDED_SECONDS
                return waiting
        return self._events.poll(seconds, 1)

    def make_way(self) -> None:
        """Let another thread have it, if this one does and others may have to wait.

        To be called before a signature that takes long, a millisecond or so.
        """
        if time.monotonic() < self._crowded_until:
            self.hand_over()
            self._beside.add(threading.get_ident())
        elif self.held:
            self._kept = True

    def hand_over(self) -> None:
        """Let another thread have it, if this one does: what comes next may take very long."""
        if self._leader == threading.get_ident():
            self._leader = 0
            self._lock.release()
