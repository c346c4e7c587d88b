"""Reaping a child without waiting for others than the child.

Run by the supervisor, once the child has ended or was killed. One that is traced ends for its
tracer first (ptrace(2)), and that may be stopped. SIGKILL does not end one that is in
uninterruptible sleep. Neither is waited for: the supervisor has others to look after.
"""

import os
import select
import subprocess
from collections.abc import Iterable

from keyd.linux.process import how_ended

__all__ = ["end_unwatched", "inherit", "leave", "reap", "reap_late"]

#: How long one may take that was killed: most are gone within milliseconds.
_SECONDS = 2.0
#: Those that were given up. As zombies, they would keep others from being reaped, and their uids.
_late: list["subprocess.Popen[bytes] | int"] = []


def reap(process: "subprocess.Popen[bytes] | int", pidfd: int) -> str:
    """How it ended, in words. One that is still there is for ``reap_late``.

    ``process`` is only a pid if the supervisor's previous program started it.
    """
    reap_late()
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    code = _code(process) if (ended := poll.poll(_SECONDS * 1000)) else None
    if code is not None:
        return how_ended(code)
    _late.append(process)
    return "ended for its tracer only" if ended else "does not end"


def end_unwatched(process: "subprocess.Popen[bytes]") -> None:
    """End one that was just started, and cannot be watched. It is for ``reap_late``."""
    process.kill()
    _late.append(process)


def reap_late() -> None:
    """Reap those that have ended since."""
    _late[:] = [process for process in _late if _code(process) is None]


def leave() -> list[int]:
    """The pids of those that were given up and are still there: for this process's next program."""
    reap_late()
    return [process if isinstance(process, int) else process.pid for process in _late]


def inherit(pids: Iterable[int]) -> None:
    """Reap those as well that this process's previous program has left."""
    _late.extend(pids)


def _code(process: "subprocess.Popen[bytes] | int") -> int | None:
    if not isinstance(process, int):
        return process.poll()
    pid, status = os.waitpid(process, os.WNOHANG)
    # One that this process traces is heard of also when it stops (ptrace(2)).
    return os.waitstatus_to_exitcode(status) if pid and not os.WIFSTOPPED(status) else None
