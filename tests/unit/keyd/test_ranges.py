"""Ranges of numbers: what is added is told once, whatever was there."""

import random

from keyd.inspection.mappings import Skipped, Span, still_mapped
from keyd.inspection.ranges import Ranges


def test_they_tell_what_was_not_there() -> None:
    rng = random.Random(1)
    for _ in range(300):
        ranges, there = Ranges(), set[int]()
        for _ in range(30):
            start = rng.randrange(60)
            wanted = range(start, start + rng.randrange(20))
            new = ranges.add(wanted.start, wanted.stop)
            assert new == sorted(new)
            told = [number for one, other in new for number in range(one, other)]
            assert len(told) == len(set(told))
            assert set(told) == set(wanted) - there
            there |= set(wanted)
            assert ranges.total == Ranges(ranges).total == len(there)


def test_what_is_mapped_still_is_told_from_what_is_not() -> None:
    spans = [Span(10, 20, ""), Span(20, 30, ""), Span(40, 50, "")]
    mapped = [(9, 2), (10, 1), (19, 5), (29, 1), (30, 11), (49, 100), (0, 100)]
    gone = [(9, 1), (0, 10), (30, 10), (50, 1)]
    parts = [Skipped("", at, octets, "") for at, octets in mapped + gone]
    assert still_mapped(parts, spans) == parts[: len(mapped)]
    assert not still_mapped(parts, [])
