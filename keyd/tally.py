"""What keyd has done so far: numbers for its supervisor.

Run by keyd's threads. Nothing here says what was signed, or for which client.
"""

import threading
from bisect import bisect_left
from collections import Counter
from typing import Any

from keyd.protocol import Operation, Status

__all__ = ["LATENCY_BOUNDS", "Tally"]

#: Upper bounds of the classes of durations, in seconds; one more class has no bound.
LATENCY_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Tally:
    """Totals since keyd's start."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: Counter[Operation] = Counter()
        self._refused: Counter[Status] = Counter()
        self._latencies = [0] * (len(LATENCY_BOUNDS) + 1)
        self._seconds = 0.0
        self._changed = False

    def done(self, operation: Operation, seconds: float) -> None:
        with self._lock:
            self._done[operation] += 1
            self._latencies[bisect_left(LATENCY_BOUNDS, seconds)] += 1
            self._seconds += seconds
            self._changed = True

    def refused(self, status: Status) -> None:
        with self._lock:
            self._refused[status] += 1
            self._changed = True

    def news(self) -> dict[str, Any] | None:
        """The totals, or None if they have not changed since the last call."""
        with self._lock:
            if not self._changed:
                return None
            self._changed = False
            return self._totals()

    def totals(self) -> dict[str, Any]:
        """How much was done, and refused by reason.

        ``seconds`` has, for each bound, how many operations took at most so long; and, as its
        last entry, how many there were.
        """
        with self._lock:
            return self._totals()

    def _totals(self) -> dict[str, Any]:
        cumulated, total = [], 0
        for count in self._latencies:
            total += count
            cumulated.append(total)
        return {
            "signed": self._done[Operation.SIGN],
            "decrypted": self._done[Operation.DECRYPT],
            "refused": {status.name.lower(): count for status, count in self._refused.items()},
            "seconds": cumulated,
            "seconds_sum": self._seconds,
        }
