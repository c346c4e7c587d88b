"""A client that keys are lent to: what it may have done, how often, and what came of it.

Run by keyd's threads. Nothing here says what was signed.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from keyd.protocol import Grants, powers_of

__all__ = ["Borrower", "Counts"]


class Counts(NamedTuple):
    """Since keyd's start; ``streams`` are those that there are now."""

    name: str
    streams: int
    done: int
    refused: dict[str, int]


class Borrower:
    """One [[keyd.client]]. It has ``most`` operations in so many seconds, on all its streams."""

    def __init__(
        self,
        name: str,
        grants: Grants,
        most: int,
        seconds: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.grants = grants
        self.rate = f"{most} in {seconds} s"
        self._most, self._per_second = float(most), most / seconds
        self._clock = clock
        self._left, self._counted_at = float(most), clock()
        self._lock = threading.Lock()
        self._streams = self._done = 0
        self._refused: Counter[str] = Counter()

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "Borrower":
        """As the supervisor tells keyd: it is trusted."""
        grants = {bytes.fromhex(key): powers_of(mask) for key, mask in told["grants"].items()}
        return cls(told["name"], grants, told["most"], told["seconds"])

    def take(self) -> bool:
        """Take one operation of those that it may have now; False if there is none."""
        with self._lock:
            now = self._clock()
            since, self._counted_at = now - self._counted_at, now
            self._left = min(self._most, self._left + since * self._per_second)
            if self._left < 1.0:
                return False
            self._left -= 1.0
            return True

    def began(self, most: int) -> bool:
        """Count another stream; False if there are as many already."""
        with self._lock:
            if self._streams >= most:
                return False
            self._streams += 1
            return True

    def ended(self) -> None:
        with self._lock:
            self._streams -= 1

    def done(self) -> None:
        with self._lock:
            self._done += 1

    def refused(self, status: str) -> None:
        with self._lock:
            self._refused[status] += 1

    @property
    def counts(self) -> Counts:
        with self._lock:
            return Counts(self.name, self._streams, self._done, dict(self._refused))
