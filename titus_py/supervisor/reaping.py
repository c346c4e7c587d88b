"""Reaping a child without waiting for others than the child.

Run by the supervisor, once the child has ended or was killed. One that is traced ends for its
tracer first (ptrace(2)), and that may be stopped. SIGKILL does not end one that is in
uninterruptible sleep. Neither is waited for: the supervisor has others to look after.
"""

import os
import select
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from keyd.linux.process import how_ended

__all__ = [
    "end_unwatched",
    "inherit",
    "leave",
    "note",
    "reap",
    "reap_orphans",
    "reaped_elsewhere",
]

#: How long one may take that was killed: most are gone within milliseconds.
_SECONDS = 2.0
#: Those that were given up. As zombies, they would keep others from being reaped, and their uids.
_late: list["subprocess.Popen[bytes] | int"] = []
#: Our own children that lead a session, and have not been reaped.
_noted: set[int] = set()
#: One for each child that leads a session, and that a thread starts and reaps.
_elsewhere: list[None] = []


def note(pid: int) -> None:
    """This child, which leads a session, is no orphan: it is for ``reap``."""
    _noted.add(pid)


@contextmanager
def reaped_elsewhere() -> Iterator[None]:
    """Meanwhile, a child that leads a session may be this thread's, which reaps it."""
    _elsewhere.append(None)
    try:
        yield
    finally:
        _elsewhere.pop()


def reap(process: "subprocess.Popen[bytes] | int", pidfd: int) -> str:
    """How it ended, in words. One that is still there is reaped later.

    ``process`` is only a pid if the supervisor's previous program started it.
    """
    _reap_late()
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    code = _code(process) if (ended := poll.poll(_SECONDS * 1000)) else None
    if code is not None:
        return how_ended(code)
    _late.append(process)
    return "ended for its tracer only" if ended else "does not end"


def end_unwatched(process: "subprocess.Popen[bytes]") -> None:
    """End one that was just started, and cannot be watched. It is reaped later."""
    note(process.pid)
    process.kill()
    _late.append(process)


def reap_orphans() -> None:
    """Reap what has ended since, of what was given up and of what children have left.

    We are who reaps what ends after its parent: workers, fork servers, and what keyd has started,
    which leads a session. Of our own children, those that lead one are noted, and the others are in
    ours. They are reaped elsewhere.
    """
    _reap_late()
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT
    # Another thread may reap a child of its own that was seen here.
    with suppress(ChildProcessError, ProcessLookupError):
        while (ended := os.waitid(os.P_ALL, 0, look)) is not None:
            pid = ended.si_pid
            session = os.getsid(pid)
            if session == os.getsid(0) or pid in _noted or (session == pid and _elsewhere):
                return
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)


def _reap_late() -> None:
    _late[:] = [process for process in _late if _code(process) is None]


def leave() -> list[int]:
    """The pids of those that were given up and are still there: for this process's next program."""
    _reap_late()
    return [process if isinstance(process, int) else process.pid for process in _late]


def inherit(pids: Iterable[int]) -> None:
    """Reap those as well that this process's previous program has left."""
    for pid in pids:
        note(pid)
        _late.append(pid)


def _code(process: "subprocess.Popen[bytes] | int") -> int | None:
    pid = process if isinstance(process, int) else process.pid
    if isinstance(process, int):
        ended, status = os.waitpid(pid, os.WNOHANG)
        # One that this process traces is heard of also when it stops (ptrace(2)).
        code = os.waitstatus_to_exitcode(status) if ended and not os.WIFSTOPPED(status) else None
    else:
        code = process.poll()
    if code is not None:
        _noted.discard(pid)
    return code
