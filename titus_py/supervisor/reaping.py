"""Reaping a child without waiting for others than the child.

Run by the supervisor, once the child has ended or was killed. One that is traced ends for its
tracer first (ptrace(2)), and that may be stopped. SIGKILL does not end one that is in
uninterruptible sleep. Neither is waited for: the supervisor has others to look after.
"""

import os
import select
import subprocess

from keyd.linux.process import how_ended

__all__ = ["reap"]

#: How long one may take that was killed: most are gone within milliseconds.
_SECONDS = 2.0


def reap(process: "subprocess.Popen[bytes] | int", pidfd: int) -> str:
    """How it ended, in words. One that is still there is reaped by Python, before the next start.

    ``process`` is only a pid if the supervisor's previous program started it.
    """
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if not poll.poll(_SECONDS * 1000):
        return "does not end"
    if isinstance(process, int):
        pid, status = os.waitpid(process, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if pid else None
    else:
        code = process.poll()
    return "ended for its tracer only" if code is None else how_ended(code)
