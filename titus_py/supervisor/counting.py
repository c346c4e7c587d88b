"""Counters that nothing can blow up: by label, and by duration. Run by the supervisor."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

__all__ = ["OTHER", "Histogram", "Tally"]

#: What is counted beyond the values that a label may take on.
OTHER = "other"
#: How many values a label may take on beyond those that are known beforehand.
_ROOM = 32


class Tally:
    """Counts by the value of one label, which takes on only so many values."""

    def __init__(self, known: Iterable[str] = (), room: int = _ROOM) -> None:
        self.counts = dict.fromkeys(known, 0)
        self._most = len(self.counts) + room

    def add(self, value: str, count: int = 1) -> None:
        if value not in self.counts and len(self.counts) >= self._most:
            value = OTHER
        self.counts[value] = self.counts.get(value, 0) + count

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def some(self) -> dict[str, int]:
        """Those that have been counted at all, the most frequent first."""
        counted = [(value, count) for value, count in self.counts.items() if count]
        return dict(sorted(counted, key=lambda pair: -pair[1]))


class Histogram:
    """Durations in seconds, by upper bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        #: Not cumulative; the last is of what is beyond all bounds.
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
