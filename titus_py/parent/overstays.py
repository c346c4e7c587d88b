"""Ends workers that stay although their client has left and nothing goes on. Run by the parent.

Our code ends by itself then. A worker that was taken over need not, and would hold its place for
ever. The kernel says whether a client has left, and whether the backend still takes octets, not the
worker.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

from titus_py.between.event_loop import EventLoop
from titus_py.between.messages import Ends
from titus_py.between.plan import Plan
from titus_py.parent.connections import CLIENT_GONE, Connections
from titus_py.parent.outbox import Tell
from titus_py.parent.sock_diag import CLOSE_WAIT, Seen, SockDiag, not_available
from titus_py.parent.worker import Worker

if TYPE_CHECKING:
    from titus_py.parent.unix_diag import UnixDiag

__all__ = ["Overstays"]

#: In how many looks in a row the client has to be gone, and nothing to have moved.
_LOOKS = 5
_SHORTEST_SECONDS = 0.5
#: How many connections to look at in a row before anything else is served, and the pause then.
_AT_ONCE, _PAUSE_SECONDS = 64, 0.01


class _Standstill(NamedTuple):
    """In how many looks in a row nothing has moved, and how far everything was."""

    looks: int
    moved: tuple[int, ...]


class Overstays:
    """Looks at every connection, once in each ``half_closed_timeout``."""

    def __init__(self, loop: EventLoop, plan: Plan, connections: Connections, tell: Tell) -> None:
        self._loop = loop
        self._every = max(_SHORTEST_SECONDS, plan.limits.half_closed_timeout)
        self._connections = connections
        self._tell = tell
        #: By connection, if its client was gone when last looked at.
        self._gone: dict[int, _Standstill] = {}
        self._left: list[Worker] = []
        self._told = False
        self._unix_diag = _unix_diag(plan)
        #: By a connection's ends, of a client or a backend, the last connection that had them.
        self._current: dict[Ends, int] = {}
        self._loop.after(self._every, self._begin)

    def _begin(self) -> None:
        """Begin a round with the connections that there are."""
        self._left = list(self._connections.busy.values())
        # Another connection may have come from the same port since.
        self._current = {
            ends: worker.connection
            for worker in self._left
            for ends in (worker.endpoints, worker.backend_ends)
            if ends is not None
        }
        self._gone = {
            worker.connection: self._gone[worker.connection]
            for worker in self._left
            if worker.connection in self._gone
        }
        self._go_on()

    def _go_on(self) -> None:
        some, self._left = self._left[:_AT_ONCE], self._left[_AT_ONCE:]
        if some:
            try:
                with SockDiag() as kernel, self._unix_diag() as unix:
                    for worker in some:
                        self._look(kernel, unix, worker)
            except OSError as error:
                # Without the kernel's word, nobody is ended.
                self._left.clear()
                if not self._told:
                    self._told = True
                    self._tell("not_available", level="warning", feature=not_available(error))
        if self._left:
            self._loop.after(_PAUSE_SECONDS, self._go_on)
        else:
            self._loop.after(self._every, self._begin)

    def _look(self, kernel: SockDiag, unix: "UnixDiag | None", worker: Worker) -> None:
        if self._connections.busy.get(worker.uid) is not worker:
            return
        number = worker.connection
        if worker.endpoints is not None:
            current = self._current[worker.endpoints] == number
            seen = kernel.look(worker.endpoints) if current else None
        else:
            current, seen = True, unix.look_at(worker.inode) if unix is not None else None
        if current and not self._has_left(seen):
            self._gone.pop(number, None)
            return
        behind = None
        if worker.backend_ends is not None and self._current.get(worker.backend_ends) == number:
            behind = kernel.look(worker.backend_ends)
        moved = _moved(seen, behind)
        before = self._gone.get(number)
        looks = before.looks + 1 if before is not None and before.moved == moved else 1
        self._gone[number] = _Standstill(looks, moved)
        if looks >= _LOOKS:
            worker.kill(CLIENT_GONE)

    def _has_left(self, seen: Seen | None) -> bool:
        """Whether the connection is over, or is half-closed and stands still for too long.

        Our code would have ended the latter. The client of one that is over may only have ended
        its half: then it is still being sent something.
        """
        if seen is None:
            return True
        return seen.state == CLOSE_WAIT and seen.silent_out > self._every


def _unix_diag(plan: Plan) -> Callable[[], AbstractContextManager["UnixDiag | None"]]:
    if not plan.has_unix_clients:
        return nullcontext
    # Others do not need it in their memory.
    from titus_py.parent.unix_diag import UnixDiag

    return UnixDiag


def _moved(client: Seen | None, behind: Seen | None) -> tuple[int, ...]:
    """How far a connection has come whose client has left: what changes while octets move.

    A slow backend may take long for what the client has sent. One on a unix socket is not asked:
    our code reads on from the client within a few times ``half_closed_timeout``, or ends.
    """
    return (
        client.unread if client else 0,
        client.acknowledged if client else 0,
        behind.acknowledged if behind else 0,
    )
