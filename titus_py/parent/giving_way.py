"""When the proxy is full: which connection gives way to a newcomer. Run by the parent.

The kernel says how long a connection has stood still, not its worker: that may be controlled by
its client by now. It costs nothing unless the proxy is full.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import islice

from titus_py.parent.admission import prefix
from titus_py.parent.sock_diag import SockDiag
from titus_py.parent.worker import Worker

__all__ = ["longest_idle"]

#: How many connections of one network to look at: the oldest.
_MOST = 1000


def longest_idle(established: Iterable[Worker], seconds: float) -> Worker | None:
    """Of the network that has most connections, the one that has stood still for longest.

    Networks are those of ``connections_per_prefix``. None if none of these connections has stood
    still for ``seconds``. Raises OSError where the kernel cannot be asked.
    """
    networks = [(worker, prefix(worker.address)) for worker in established]
    counts = Counter(network for _, network in networks)
    most = max(counts.values(), default=0)
    candidates = islice((worker for worker, network in networks if counts[network] == most), _MOST)
    longest: Worker | None = None
    with SockDiag() as kernel:
        for worker in candidates:
            seen = kernel.look(worker.endpoints)
            # A connection that is over gives way first.
            idle = min(seen.silent_in, seen.silent_out) if seen else float("inf")
            if idle >= seconds:
                longest, seconds = worker, idle
    return longest
