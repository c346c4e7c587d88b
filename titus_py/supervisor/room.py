"""Room for another generation beside the existing ones. Run by the supervisor.

Earlier generations whose connections go on take up uids. Where that keeps a fork server from being
replaced whose workers crash, the connections of some are ended: an attacker could otherwise keep
the layout of its memory by keeping connections open.
"""

from itertools import combinations

from titus_py.supervisor.children import Children
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.generations import Generations
from titus_py.supervisor.record import Event
from titus_py.supervisor.uid_blocks import UidBlocks

__all__ = ["Room"]

#: Each has a parent, a fork server and a keyd.
_MOST_GENERATIONS = 8


class Room:
    def __init__(
        self, event: Event, generations: Generations, children: Children, uids: UidBlocks
    ) -> None:
        self._event = event
        self._generations = generations
        self._children = children
        self._uids = uids

    def is_there(self, serving: Generation) -> bool:
        """Whether another generation like the one that serves can be started now."""
        few = len(list(self._generations)) < _MOST_GENERATIONS
        return few and self._uids.free(serving, self._generations) is not None

    def make(self, serving: Generation) -> None:
        """End the connections of as few generations as possible, the oldest first.

        None is ended if there will be room when the processes of ended generations are gone, or
        if even the end of all would make none.
        """
        staying = [one for one in self._generations if not one.gives_way]
        retired = [one for one in staying if one.retired and one.parent is not None]
        for count in range(len(retired) + 1):
            for leaving in combinations(retired, count):
                if self._suffices(serving, [one for one in staying if one not in leaving]):
                    for generation in leaving:
                        self._end(generation)
                    return

    def _suffices(self, serving: Generation, staying: list[Generation]) -> bool:
        few = len(staying) < _MOST_GENERATIONS
        return few and self._uids.free_later(serving, staying) is not None

    def _end(self, generation: Generation) -> None:
        generation.gives_way = True
        self._event("generation_gives_way", level="warning", generation=generation.number)
        if generation.parent is not None:
            self._children.order(generation.parent, {"do": "close"})
