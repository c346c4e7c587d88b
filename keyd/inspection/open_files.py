"""What the kernel tells of a file that a process has open, and does not ask the file for (proc(5)).

Run by ``keyd status``, ``keyd audit`` and the search for keys in memory, as root. Any user can have
any file open: to look at that one itself may hang, or do something.
"""

import errno
import os
from pathlib import Path
from typing import NamedTuple

__all__ = ["Opened", "name_of", "opened"]


class Opened(NamedTuple):
    """The number of the mount that a file is on (``keyd.linux.mounts``), and the access mode."""

    mount: int
    access: int


def opened(process: int | str, descriptor: int | str) -> Opened:
    """Raises FileNotFoundError, ProcessLookupError if it is open no more."""
    # Further lines are of the kind of file, and may have a name that a user has given it.
    lines = Path(f"/proc/{process}/fdinfo/{descriptor}").read_bytes().split(b"\n")[:3]
    fields = dict(line.split(b":", 1) for line in lines)
    return Opened(int(fields[b"mnt_id"]), int(fields[b"flags"], 8) & os.O_ACCMODE)


def name_of(link: str) -> str:
    """A file's path, where /proc has a link to the file; empty if the path is too long.

    Any user can make one that is longer than any system call takes: the kernel tells none of it.
    """
    try:
        return os.readlink(link)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return ""
        raise
