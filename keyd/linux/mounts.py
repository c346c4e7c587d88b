"""What is mounted where, as the kernel lists it for a process (proc_pid_mountinfo(5)).

Run by audits, as root. Any user names a place, a source and a kind (fusermount3(1)): the kernel
escapes what parts fields and lines, and no other octet.
"""

import errno
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

__all__ = ["Mount", "mounts", "uncovered"]


#: What is in memory; and what has disks that the kernel does not know of.
_LOCAL = "tmpfs", "ramfs", "zfs"


class Mount(NamedTuple):
    """``device`` (major:minor) is the file system, ``root`` the part of it that is mounted here."""

    number: int
    on: int  #: the number of the mount that it is mounted on
    device: str
    root: str
    path: str
    options: str
    kind: str
    of_the_whole: str  #: the file system's own options, wherever it is mounted

    @property
    def is_writable(self) -> bool:
        return all("rw" in options.split(",") for options in (self.options, self.of_the_whole))

    @property
    def is_of_a_program(self) -> bool:
        """Whether a program answers for it (FUSE): it may be any user's."""
        return self.kind.split(".")[0] in ("fuse", "fuseblk")

    @property
    def is_of_a_user(self) -> bool:
        return self.is_of_a_program and "user_id=0" not in self.of_the_whole.split(",")

    @property
    def is_local(self) -> bool:
        """Whether it is memory or a disk: neither a program nor another host answers for it."""
        return self.kind in _LOCAL or (self.kind in _of_disks() and not self.is_of_a_program)


def mounts(pid: int | str = "self") -> list[Mount]:
    """All of them. Raises FileNotFoundError, ProcessLookupError if the process has ended."""
    try:
        listed = os.fsdecode(Path(f"/proc/{pid}/mountinfo").read_bytes())
    except OSError as error:
        if error.errno == errno.EINVAL:
            # The kernel says so of a process that has left its namespaces.
            raise ProcessLookupError(errno.ESRCH, "ended") from None
        raise
    return [_mount(line) for line in listed.split("\n")[:-1]]


def uncovered(found: Sequence[Mount]) -> list[Mount]:
    """One for each place. A newer one may be covered by an older one, which was moved there."""
    paths = {mount.number: mount.path for mount in found}
    covered = {mount.on for mount in found if paths.get(mount.on) == mount.path}
    return [mount for mount in found if mount.number not in covered]


@cache
def _of_disks() -> frozenset[str]:
    """The kinds of file systems that are on a disk (/proc/filesystems; proc_filesystems(5))."""
    lines = Path("/proc/filesystems").read_text().splitlines()
    return frozenset(line.strip() for line in lines if not line.startswith("nodev"))


def _mount(line: str) -> Mount:
    before, _, after = line.partition(" - ")
    # What follows in the first part is optional.
    number, on, device, root, path, options = before.split(" ")[:6]
    kind, _, of_the_whole = after.split(" ", 2)
    root, path = _unescaped(root), _unescaped(path)
    return Mount(int(number), int(on), device, root, path, options, kind, of_the_whole)


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
