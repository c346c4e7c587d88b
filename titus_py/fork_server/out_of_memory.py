"""Whom the kernel ends when memory runs out: workers, then the fork server, then all others.

Run by the fork server. A worker has the adjustment that the fork server has when it forks, and
cannot reach its own. So the fork server raises its own for that moment. The file is open, since it
has no path to it once it is confined (proc_pid_oom_score_adj(5)). For that moment, too, the fork
server has less memory than a worker with a client: it gives back the code that it ran only once.
"""

import os

from keyd.linux.calls import address, call
from keyd.linux.process import Call, encode, make
from titus_py.fork_server.files import unchanged

__all__ = ["FILE", "OutOfMemory", "give_code_back"]

#: In thousandths of the machine's memory: as if the process had so much more. Less than what a
#: program has that eats up the machine.
_FORK_SERVERS, _WORKERS = 100, 200
_MOST = 1000
_MADV_DONTNEED = 4
FILE = "/proc/self/oom_score_adj"


class OutOfMemory:
    """The calls (encoded) that make this process one of those that are ended first, or second.

    ``descriptor`` is of ``FILE``. Makes it a fork server's at once. Raises OSError.
    """

    def __init__(self, descriptor: int) -> None:
        before = int(os.pread(descriptor, 8, 0))
        #: What the calls point to.
        self._texts: list[bytes] = []
        self.as_workers, self.as_fork_server = (
            self._call(descriptor, str(min(before + more, _MOST)))
            for more in (_WORKERS, _FORK_SERVERS)
        )
        make(self.as_fork_server)

    def _call(self, descriptor: int, score: str) -> bytes:
        text = score.encode()
        self._texts.append(text)
        return encode([Call("pwrite64", (descriptor, address(text), len(text), 0))])


def give_code_back() -> None:
    """Unmap the pages of code that have been run. Those that are run again are still in memory.

    Raises OSError.
    """
    for place in [one.place for one in unchanged() if one.permissions == "r-xp"]:
        call("madvise", place.start, len(place), _MADV_DONTNEED)
