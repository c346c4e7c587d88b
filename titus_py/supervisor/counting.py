"""Counters of bounded size: by label, and by duration. Run by the supervisor."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

__all__ = ["OTHER", "Histogram", "Tally"]

#: The label value for everything beyond the values that a label may have.
OTHER = "other"
#: How many values a label may have beyond those that are known beforehand.
_ROOM = 32


class Tally:
    """Counts by the value of one label. The number of values is bounded."""

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
        """The counts above zero, the highest first."""
        counted = [(value, count) for value, count in self.counts.items() if count]
        return dict(sorted(counted, key=lambda pair: -pair[1]))


class Histogram:
    """Durations in seconds, by upper bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        #: Not cumulative. The last one counts values above all bounds.
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count
