"""Whether root, or the system's service manager, has made a process what it is.

Run by ``keyd audit``, as root. Any user can run what looks like a keyd, and have it say anything:
that it is to have a key that was stolen, or has one that others' memory is full of. What is asked
of the kernel here, such a user cannot make so.
"""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

__all__ = [
    "is_of_the_system",
    "may_read",
    "of_root",
    "sees_the_whole_machine",
    "unit_in",
    "unit_of",
    "user_of",
]

#: The inodes of the first namespaces, which the kernel's interface has (linux/nsfs.h).
_FIRST = {"pid": 0xEFFFFFFC, "user": 0xEFFFFFFD}


def of_root(pids: Iterable[int]) -> set[int]:
    """Those that root runs, or has put into an empty root, or that are a service of the system.

    One has to be the whole of that service: an attacker who is in a server has a part of one.
    What cannot be looked into is none of them.
    """
    services = _Services()
    found = set()
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if (
                pid == 1
                or user_of(pid) == 0
                or _is_in_an_empty_root(pid)
                or services.are_one_with(pid)
            ):
                found.add(pid)
    return found


def is_of_the_system(pid: int) -> bool:
    """Root runs it, or it is in a service of the system: as what an attacker may be, too."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return user_of(pid) == 0 or bool(unit_of(pid))
    return False


def user_of(pid: int) -> int:
    """Who runs a process: its real uid. What is root's for whoever runs it (setuid) is a user's.

    Raises FileNotFoundError, ProcessLookupError if it has ended.
    """
    return int(_status(pid)[b"Uid"][0])


def _status(pid: int) -> dict[bytes, list[bytes]]:
    lines = Path(f"/proc/{pid}/status").read_bytes().split(b"\n")
    return {name: words.split() for name, _, words in (one.partition(b":") for one in lines)}


def sees_the_whole_machine() -> bool:
    """Whether this process is in no container whose processes alone it can see, or look into."""
    return all(os.stat(f"/proc/self/ns/{kind}").st_ino == inode for kind, inode in _FIRST.items())


def may_read(pid: int, file: str) -> bool:
    """Whether a process's user and groups may read a file: then it needs nobody to have its key."""
    with suppress(OSError):
        seen = os.stat(file)
        fields = _status(pid)
        if int(fields[b"Uid"][0]) == seen.st_uid:
            return bool(seen.st_mode & 0o400)
        groups = {int(one) for one in (fields[b"Gid"][0], *fields[b"Groups"])}
        return bool(seen.st_mode & (0o040 if seen.st_gid in groups else 0o004))
    return False


def _is_in_an_empty_root(pid: int) -> bool:
    """By chroot(2), which takes a privilege in our user namespace. In their own, anybody has it."""
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Nobody comes back from another one. So it has not made this root there, of what may hang.
        if os.readlink(f"/proc/{pid}/ns/user") != os.readlink("/proc/self/ns/user"):
            return False
        return os.fstat(root).st_uid == 0 and not os.listdir(f"/proc/self/fd/{root}")
    finally:
        os.close(root)


def unit_of(pid: int) -> str:
    """The system's service that a process is in; empty if there is none."""
    return unit_in(_control_groups(pid))


def unit_in(groups: str) -> str:
    """The system's service that /proc/PID/cgroup names; empty if there is none.

    A user's own service manager is one itself, and the user may put any process into its control
    group, or into one below it: that may have the name of any other.
    """
    found = re.search(r"^[^/\n]*(/[^\n]*)?/([^/\n]+\.service)$", groups, re.MULTILINE)
    return found[2] if found and "/user@" not in found[0] else ""


class _Services:
    """What is in them. All processes are looked at once, however many are asked about."""

    def __init__(self) -> None:
        #: By control groups, each process and its parent.
        self._parents: dict[str, dict[int, int]] = {}

    def are_one_with(self, pid: int) -> bool:
        """Whether all of a service is below this process, or is it."""
        group = _control_groups(pid)
        if not unit_in(group):
            return False
        if not self._parents:
            self._look()
        parents = self._parents.get(group, {})
        return pid in parents and all(one == pid or _is_below(one, pid, parents) for one in parents)

    def _look(self) -> None:
        for name in os.listdir("/proc"):
            with suppress(FileNotFoundError, ProcessLookupError):
                if name.isdigit():
                    stat = Path(f"/proc/{name}/stat").read_bytes()
                    parent = int(stat.rpartition(b")")[2].split()[1])
                    self._parents.setdefault(_control_groups(int(name)), {})[int(name)] = parent


def _is_below(one: int, pid: int, parents: Mapping[int, int]) -> bool:
    for _ in parents:
        one = parents.get(one, 0)
        if one == pid:
            return True
    return False


def _control_groups(pid: int) -> str:
    """A user may give one any name but with a line feed. As text, a carriage return were one."""
    return os.fsdecode(Path(f"/proc/{pid}/cgroup").read_bytes())
