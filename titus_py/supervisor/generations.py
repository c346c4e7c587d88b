"""The list of generations. Run by the supervisor.

A generation is one configuration, one parent and one keyd. The last generation serves, or is
about to. The others serve the connections that they have.
"""

from collections.abc import Iterator

from titus_py.supervisor.child import Child
from titus_py.supervisor.generation import Generation

__all__ = ["Generations"]


class Generations:
    def __init__(self) -> None:
        self._all: list[Generation] = []

    def __iter__(self) -> Iterator[Generation]:
        """From the oldest to the newest. The list may change meanwhile."""
        return iter(self._all.copy())

    def append(self, generation: Generation) -> None:
        """Add the generation that serves from now on, or is about to."""
        self._all.append(generation)

    def remove(self, generation: Generation) -> None:
        self._all.remove(generation)

    @property
    def next_number(self) -> int:
        return self._all[-1].number + 1 if self._all else 1

    @property
    def serving(self) -> Generation:
        return self._all[-1]

    @property
    def parents(self) -> list[Child]:
        return [generation.parent for generation in self._all if generation.parent is not None]
