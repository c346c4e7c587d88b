"""Connections that were signed for and never came to their backend, by prefix."""

import pytest

from titus_py.parent import unfinished
from titus_py.parent.unfinished import Unfinished


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_prefix_has_so_many_and_as_many_again_in_its_time() -> None:
    clock = Clock()
    some = Unfinished(per_prefix=4, every=8.0, clock=clock)
    for _ in range(4):
        assert not some.reached("192.0.2")
        some.count("192.0.2", "192.0.2.1")
    assert some.reached("192.0.2")
    assert not some.reached("192.0.3")
    clock.now = 2.0
    assert not some.reached("192.0.2")
    some.count("192.0.2", "192.0.2.1")
    assert some.reached("192.0.2")
    clock.now = 10.0
    for _ in range(4):
        assert not some.reached("192.0.2")
        some.count("192.0.2", "192.0.2.1")
    assert some.reached("192.0.2")


def test_the_first_one_of_each_address_is_told_apart() -> None:
    clock = Clock()
    some = Unfinished(per_prefix=3, every=6.0, clock=clock)
    told = [some.count("192.0.2", f"192.0.2.{last}") for last in (1, 1, 2, 2, 1)]
    assert told == [True, False, True, False, False]
    clock.now = 60.0
    assert some.count("192.0.2", "192.0.2.1")


def test_it_keeps_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished, "_MAX_PREFIXES", 3)
    some = Unfinished(per_prefix=1, every=60.0, clock=Clock())
    for last in range(5):
        some.count(f"192.0.{last}", f"192.0.{last}.1")
        for other in range(9):
            some.count(f"192.0.{last}", f"192.0.{last}.{other}")
    assert [some.reached(f"192.0.{last}") for last in range(5)] == [False, False, True, True, True]
    assert all(len(bucket.addresses) <= 1 for bucket in some._buckets.values())
