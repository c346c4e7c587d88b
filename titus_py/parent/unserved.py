"""Tells of clients that ended without a worker: before their ClientHello came. Run by the parent.

Such a client costs its sender next to nothing. So only some of them in each second have an event
of their own, one at their end; the others are counted. A flood of them takes no room from events
that interest a reader.
"""

import time

from titus_py.between.event_loop import EventLoop
from titus_py.parent.arrival import Arrival
from titus_py.parent.connections import Connections
from titus_py.parent.outbox import Tell

__all__ = ["Unserved"]

#: How many in a second have an event of their own, and how often the others are told of.
_EACH, _TELL_SECONDS = 20, 1.0


class _Others:
    """Those that ended in the same way within one second: how many, and for how long in all."""

    __slots__ = ("count", "last_client", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self.last_client = ""


class Unserved:
    """Records each client: its end as an event of its own, or as one of a number."""

    def __init__(self, loop: EventLoop, connections: Connections, tell: Tell) -> None:
        self._loop = loop
        self._connections = connections
        self._tell = tell
        #: How many have had an event of their own within this second.
        self._told = 0
        #: By how they ended.
        self._others: dict[str, _Others] = {}

    def over(self, arrival: Arrival, end: str) -> None:
        if not self._told:
            self._loop.after(_TELL_SECONDS, self._next_second)
        if self._told < _EACH:
            self._told += 1
            self._connections.over(arrival, end)
            return
        others = self._others.setdefault(end, _Others())
        others.count += 1
        others.seconds += time.monotonic() - arrival.since
        others.last_client = arrival.address

    def say_last(self) -> None:
        """Tell, before the parent ends, of those that have not been told of yet."""
        for end, others in self._others.items():
            self._tell(
                "silent_clients",
                level="info",
                end=end,
                count=others.count,
                last_client=others.last_client,
                seconds=round(others.seconds, 3),
            )
        self._others.clear()

    def _next_second(self) -> None:
        self._told = 0
        self.say_last()
