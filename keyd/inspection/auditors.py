"""Which processes are audits': they have the keys that they look for, and so have others' audits.

Run by ``keyd audit`` and by the search of ``titus-py audit``, as root, before either has a key.
Each holds a shared lock on one file, which only root can open, until it ends; its memory is gone
before that. The kernel tells who holds it (/proc/locks; proc(5)). So audits do not wait for each
other, and none takes another one for a process that a key has leaked to.
"""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

__all__ = ["join", "pids"]

_LOCK = "/run/keyd-audits.lock"


def join() -> None:
    """This process is an audit's from now on. Where no such file can be made, nobody knows."""
    with suppress(OSError):
        lock = os.open(_LOCK, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_SH)


def pids() -> set[int]:
    """Those that hold the lock at this moment."""
    try:
        seen = os.lstat(_LOCK)
    except FileNotFoundError:
        return set()
    file = f"{os.major(seen.st_dev):02x}:{os.minor(seen.st_dev):02x}:{seen.st_ino}"
    # Its number, FLOCK, ADVISORY, READ, the process, the file, and a range.
    locks = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return {int(lock[4]) for lock in locks if lock[1] == "FLOCK" and lock[5] == file}
