"""What happens: counted, and logged where it is of interest to a reader. Run by the supervisor."""

from typing import Any, Protocol

from titus_py.supervisor.log import Log
from titus_py.supervisor.metrics import Metrics

__all__ = ["Event", "Record"]

#: What children say that is of no interest to a reader.
_NOT_FOR_THE_LOG = frozenset({"retired", "alive", "operations"})


class Event(Protocol):
    """What a ``Record`` is called with."""

    def __call__(self, name: str, of_generation: int = 0, **fields: Any) -> None: ...


class Record:
    def __init__(self, log: Log) -> None:
        self.log = log
        self.metrics = Metrics()

    def __call__(self, name: str, of_generation: int = 0, **fields: Any) -> None:
        """An event: ``of_generation`` is the number of the one whose child told it."""
        self.metrics.record(name, {"level": "info", **fields}, of_generation)
        if name not in _NOT_FOR_THE_LOG:
            self.log(name, **fields)
