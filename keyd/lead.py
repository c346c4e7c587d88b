"""One thread at a time waits for events, and handles those that are quick.

Used by keyd's threads. Where each takes what comes next, they wait for Python's lock and wake each
other, again and again for one request. So whoever has the lead keeps it, until something takes long
that others can run beside. The next one is woken by an event that comes meanwhile, and not before:
mostly none comes.
"""

import select
import threading

__all__ = ["Lead"]

_DISARMED = select.EPOLLONESHOT
_ARMED = select.EPOLLONESHOT | select.EPOLLIN


class Lead:
    """Of at most one thread; ``events`` is what it waits for."""

    def __init__(self, events: select.epoll) -> None:
        self._lock = threading.Lock()
        self._leader = 0
        self._events = events.fileno()
        #: Tells one thread that there are events and nobody has the lead: it is armed whenever
        #: nobody has it. It may also be armed when somebody has, so it may tell in vain.
        self._vacancy = select.epoll()
        self._vacancy.register(self._events, _DISARMED)

    def take(self, seconds: float) -> bool:
        """Take the lead if nobody has it, now or within this time if there are events.

        Returns whether this thread has it.
        """
        if self._lock.acquire(blocking=False):
            self._vacancy.modify(self._events, _DISARMED)
        else:
            self._vacancy.poll(seconds, 1)
            if not self._lock.acquire(blocking=False):
                return False
        self._leader = threading.get_ident()
        return True

    @property
    def held(self) -> bool:
        """Whether this thread has it."""
        return self._leader == threading.get_ident()

    def hand_over(self) -> None:
        """Let another thread have it, if this one does: what comes next takes long."""
        if self.held:
            self._leader = 0
            # Before the others are told: whoever is told in vain is not told again.
            self._lock.release()
            self._vacancy.modify(self._events, _ARMED)
