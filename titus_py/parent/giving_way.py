"""When the proxy is full: which connection gives way to a newcomer. Run by the parent.

The kernel says how long a connection has stood still, not its worker: that may be controlled by
its client by now. It costs nothing unless the proxy is full, and then, however many newcomers there
are, the kernel is asked about each connection about once a second.
"""

import time
from collections import Counter
from collections.abc import Mapping
from itertools import islice

from titus_py.parent.admission import prefix
from titus_py.parent.sock_diag import SockDiag
from titus_py.parent.worker import Worker

__all__ = ["GivingWay"]

#: How many connections of one network to look at: the oldest.
_MOST = 1000
#: How many are asked about once more, at most, before one gives way: many may have moved again, and
#: the parent serves nobody meanwhile.
_MOST_AGAIN = 32
#: For how long it holds which connections there are, and how long each has stood still.
_KEPT_SECONDS = 1.0


class GivingWay:
    """``busy`` are the connections, ``handshaking`` those of them that cannot give way yet.

    Both by uid, the oldest first. None gives way that has stood still for less than ``seconds``.
    """

    def __init__(
        self, busy: Mapping[int, Worker], handshaking: Mapping[int, Worker], seconds: float
    ) -> None:
        self._busy = busy
        self._handshaking = handshaking
        self._seconds = seconds
        self._until = 0.0
        #: As of then: the connections with their networks, those of ``connections_per_prefix``;
        #: how many each network has; and of some connections, for how long they had stood still.
        self._networks: dict[Worker, str] = {}
        self._counts: Counter[str] = Counter()
        self._idle: dict[Worker, float] = {}

    def choose(self) -> Worker | None:
        """Of the network that has most connections, the one that has stood still for longest.

        Raises OSError where the kernel cannot be asked.
        """
        if time.monotonic() >= self._until:
            self._look_anew()
        with SockDiag() as kernel:
            for _ in range(_MOST_AGAIN):
                worker = self._longest(kernel)
                if worker is None:
                    break
                if self._may_give_way(worker):
                    idle = self._idle[worker] = _idle(kernel, worker)
                    if idle >= self._seconds:
                        self._forget(worker)
                        return worker
                else:
                    self._forget(worker)
        return None

    def _look_anew(self) -> None:
        self._networks = {
            worker: prefix(worker.address)
            for worker in self._busy.values()
            if self._may_give_way(worker)
        }
        self._counts = Counter(self._networks.values())
        self._idle.clear()
        self._until = time.monotonic() + _KEPT_SECONDS

    def _may_give_way(self, worker: Worker) -> bool:
        uid = worker.uid
        return (
            self._busy.get(uid) is worker and uid not in self._handshaking and not worker.killed_for
        )

    def _longest(self, kernel: SockDiag) -> Worker | None:
        """The one that had stood still for longest; None if none had for so long."""
        most = max(self._counts.values(), default=0)
        candidates = (
            worker for worker, network in self._networks.items() if self._counts[network] == most
        )
        longest, seconds = None, self._seconds
        for worker in islice(candidates, _MOST):
            if worker not in self._idle:
                self._idle[worker] = _idle(kernel, worker)
            if self._idle[worker] >= seconds:
                longest, seconds = worker, self._idle[worker]
        return longest

    def _forget(self, worker: Worker) -> None:
        self._counts[self._networks.pop(worker)] -= 1


def _idle(kernel: SockDiag, worker: Worker) -> float:
    """For how many seconds it has stood still. A connection that is over gives way first.

    The client may be on a unix socket, which the kernel does not time. Then the connection to its
    backend or server counts. If that is one, too, nobody knows, and it does not give way.
    """
    ends = worker.endpoints or worker.backend_ends
    if ends is None:
        return 0.0
    seen = kernel.look(ends)
    return min(seen.silent_in, seen.silent_out) if seen else float("inf")
