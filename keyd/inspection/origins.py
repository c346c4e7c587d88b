"""Whether root, or the system's service manager, has made a process what it is.

Run by ``keyd audit``, as root. Any user can run what looks like a keyd, and have it say anything:
that it is to have a key that was stolen, or has one that others' memory is full of. What is asked
of the kernel here, such a user cannot make so.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

__all__ = ["is_of_root", "may_read", "unit_in"]


def is_of_root(pid: int) -> bool:
    """Whether root runs it, or has put it into an empty root, or it is a service of the system.

    It has to be the whole of that service: an attacker who is in a server has a part of one.
    """
    with suppress(FileNotFoundError, ProcessLookupError):
        return (
            pid == 1
            or os.stat(f"/proc/{pid}").st_uid == 0
            or _is_in_an_empty_root(pid)
            or _is_a_service(pid)
        )
    return False


def may_read(pid: int, file: str) -> bool:
    """Whether a process's user and groups may read a file: then it needs nobody to have its key."""
    with suppress(OSError):
        seen = os.stat(file)
        lines = Path(f"/proc/{pid}/status").read_bytes().split(b"\n")
        fields = {name: words.split() for name, _, words in (one.partition(b":") for one in lines)}
        if int(fields[b"Uid"][1]) == seen.st_uid:
            return bool(seen.st_mode & 0o400)
        groups = {int(one) for one in (fields[b"Gid"][1], *fields[b"Groups"])}
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


def unit_in(groups: str) -> str:
    """The system's service that /proc/PID/cgroup names; empty if there is none.

    A user's own service manager is one itself, and those that it starts are below it: they may
    have the name of any other.
    """
    found = re.search(r"^[^/]*(/.*)?/([^/\n]+\.service)$", groups, re.MULTILINE)
    return found[2] if found and "/user@" not in (found[1] or "") else ""


def _is_a_service(pid: int) -> bool:
    group = _control_groups(pid)
    if not unit_in(group):
        return False
    parents = {}
    for name in os.listdir("/proc"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if name.isdigit() and _control_groups(int(name)) == group:
                stat = Path(f"/proc/{name}/stat").read_bytes()
                parents[int(name)] = int(stat.rpartition(b")")[2].split()[1])
    return all(one == pid or _is_below(one, pid, parents) for one in parents)


def _is_below(one: int, pid: int, parents: Mapping[int, int]) -> bool:
    for _ in parents:
        one = parents.get(one, 0)
        if one == pid:
            return True
    return False


def _control_groups(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text(errors="replace")
