"""Which processes are audits': they have the keys that they look for, and so have others' audits.

Run by ``keyd audit`` and by the search of ``titus-py audit``, as root, before either has a key.
Each holds a shared lock on one file, which only root can open, until it ends; its memory is gone
before that. The kernel tells of each open file whether it has a lock (/proc/PID/fdinfo; proc(5)).
So audits do not wait for each other, and none takes another one for a process that a key has leaked
to.

/proc/locks would name all of them at once. But it is read in pieces, and leaves some out while
others come and go.
"""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from keyd.inspection.open_files import name_of

__all__ = ["is_one", "join"]

_LOCK = "/run/keyd-audits.lock"


def join() -> None:
    """This process is an audit's from now on. Where no such file can be made, nobody knows."""
    with suppress(OSError):
        lock = os.open(_LOCK, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_SH)


def is_one(pid: int) -> bool:
    """Whether this process holds the lock at this moment. Raises PermissionError."""
    with suppress(FileNotFoundError, ProcessLookupError):
        if b"\nUid:\t0\t" not in Path(f"/proc/{pid}/status").read_bytes():
            # Nobody else can have it, but any number of descriptors.
            return False
        seen = os.lstat(_LOCK)
        file = f"{os.major(seen.st_dev):02x}:{os.minor(seen.st_dev):02x}:{seen.st_ino}"
        return any(_locks(pid, one, file) for one in os.listdir(f"/proc/{pid}/fd"))
    return False


def _locks(pid: int, descriptor: str, file: str) -> bool:
    # The process closes others meanwhile.
    with suppress(FileNotFoundError):
        if name_of(f"/proc/{pid}/fd/{descriptor}").endswith(os.path.basename(_LOCK)):
            lines = Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text().splitlines()
            # "lock:", a number, FLOCK, ADVISORY, READ, the process, the file, and a range.
            words = [line.split() for line in lines if line.startswith("lock:")]
            return any(lock[2] == "FLOCK" and lock[6] == file for lock in words)
    return False
