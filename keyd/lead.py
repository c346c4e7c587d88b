"""One thread at a time waits for events, and handles those that are quick.

Used by keyd's threads. Where each takes what comes next, they wait for Python's lock and wake each
other, again and again for one request. So whoever has the lead keeps it, until something takes long
that others can run beside.
"""

import threading

__all__ = ["Lead"]


class Lead:
    """Of at most one thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leader = 0

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

    def hand_over(self) -> None:
        """Let another thread have it, if this one does: what comes next takes long."""
        if self.held:
            self._leader = 0
            self._lock.release()
