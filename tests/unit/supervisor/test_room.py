"""Which generations give way to one that replaces a fork server whose workers crash."""

from types import SimpleNamespace
from typing import Any

from titus_py.between.event_loop import EventLoop
from titus_py.configuration.held_uids import HeldUids
from titus_py.supervisor.generations import Generations
from titus_py.supervisor.room import Room
from titus_py.supervisor.uid_blocks import UidBlocks

# Beyond what is a uid: nothing can have one.
FIRST = 2**32


class Crowd:
    """Generations, the last of which serves, with blocks of these numbers of uids."""

    def __init__(self, available: int, *blocks: int) -> None:
        self.said: list[tuple[str, int]] = []
        self.ended: list[int] = []
        self.generations = Generations()
        self.uids = UidBlocks(EventLoop(), self.say, HeldUids(-1))
        children: Any = SimpleNamespace(order=lambda parent, _: self.ended.append(parent))
        self.room = Room(self.say, self.generations, children, self.uids)
        start = FIRST
        for number, block in enumerate(blocks, 1):
            generation: Any = SimpleNamespace(
                number=number,
                parent=number,
                retired=number < len(blocks),
                gives_way=False,
                uids=range(start, start + block),
                uids_needed=block,
                configuration=SimpleNamespace(
                    worker=SimpleNamespace(uids=range(FIRST, FIRST + available))
                ),
            )
            self.generations.append(generation)
            start += block

    def say(self, name: str, of_generation: int = 0, **fields: Any) -> None:
        self.said.append((name, fields["generation"]))

    def make_room(self) -> list[int]:
        """Ask for room; returns who was ended, in all."""
        self.room.make(self.generations.serving)
        return self.ended

    def end(self, number: int) -> range:
        """The parent of that generation ends. Returns its uids, which its workers still have."""
        generation = next(one for one in self.generations if one.number == number)
        self.generations.remove(generation)
        self.uids.used.append(generation.uids)
        return generation.uids

    def is_there(self) -> bool:
        return self.room.is_there(self.generations.serving)


def test_one_gives_way_and_no_other_before_its_uids_are_free() -> None:
    crowd = Crowd(30, 10, 10, 10)
    assert not crowd.is_there()
    assert crowd.make_room() == [1]
    assert crowd.make_room() == [1], "it is still ending its connections"
    uids = crowd.end(1)
    assert not crowd.is_there()
    assert crowd.make_room() == [1], "its workers still have its uids"
    crowd.uids.used.remove(uids)
    assert crowd.is_there()
    assert crowd.said == [("generation_gives_way", 1)]


def test_nobody_gives_way_for_uids_that_are_about_to_be_free() -> None:
    crowd = Crowd(30, 10, 10, 10)
    crowd.end(2)
    assert not crowd.is_there()
    assert crowd.make_room() == []


def test_the_oldest_one_does_whose_end_makes_room() -> None:
    assert Crowd(24, 2, 10, 2, 10).make_room() == [2]
    assert Crowd(21, 5, 6, 10).make_room() == [1, 2], "one alone is not enough"


def test_nobody_does_where_that_makes_no_room() -> None:
    assert Crowd(18, 4, 4, 10).make_room() == []


def test_eight_generations_are_enough() -> None:
    crowd = Crowd(1000, *[10] * 8)
    assert not crowd.is_there()
    assert crowd.make_room() == [1]
    assert crowd.make_room() == [1]
    crowd.end(1)
    assert crowd.is_there()
