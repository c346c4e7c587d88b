"""Sets of numbers, such as the octets of a file, as ranges that do not touch."""

from bisect import bisect_left, bisect_right

__all__ = ["Ranges"]


class Ranges:
    def __init__(self, others: "Ranges | None" = None) -> None:
        #: In ascending order: where one begins, where it ends, where the next one begins.
        self._bounds: list[int] = [] if others is None else [*others._bounds]

    @property
    def total(self) -> int:
        """How many numbers there are."""
        return sum(self._bounds[1::2]) - sum(self._bounds[::2])

    def add(self, start: int, end: int) -> list[tuple[int, int]]:
        """Returns what of it was not there yet, in ascending order."""
        bounds = self._bounds
        first, after = bisect_left(bounds, start), bisect_right(bounds, end)
        # An odd place is within a range.
        begin = [] if first % 2 else [start]
        finish = [] if after % 2 else [end]
        edges = [*begin, *bounds[first:after], *finish]
        bounds[first:after] = [*begin, *finish]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return [(one, other) for one, other in pairs if one < other]
