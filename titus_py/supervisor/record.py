"""Counts every event, and logs those that interest a reader. Run by the supervisor."""

from typing import Any, Protocol

from titus_py.supervisor.log import Log
from titus_py.supervisor.metrics import Metrics

__all__ = ["Event", "Record"]

#: Children's events that do not interest a reader.
_NOT_FOR_THE_LOG = frozenset({"retired", "alive", "operations", "token_operations", "lent"})


class Event(Protocol):
    """What a ``Record`` is called with."""

    def __call__(self, name: str, of_generation: int = 0, **fields: Any) -> None: ...


class Record:
    def __init__(self, log: Log) -> None:
        self.log = log
        self.metrics = Metrics()

    def __call__(self, name: str, of_generation: int = 0, **fields: Any) -> None:
        """Record an event. ``of_generation``: the number of the generation whose child sent it."""
        self.metrics.record(name, fields, of_generation)
        if name not in _NOT_FOR_THE_LOG:
            self.log(name, **fields)
