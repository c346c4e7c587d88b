"""Which files of the machine are visible in another mount namespace, as systemd makes one.

Run by ``titus-py audit``, as root, for a keyd that is a unit of its own. It trusts the kernel
(proc_pid_mountinfo(5)). What may be visible there is listed here; anything else is too much.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from keyd.printable import printable

__all__ = ["Mount", "in_sight", "mounts"]

#: Programs, libraries, the cache for finding libraries, and what the kernel says of the machine.
_SAME = ("/sys", "/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache")
#: File systems that show what the kernel says, and hold nobody's files.
_KERNELS = {"proc", "sysfs", "cgroup", "cgroup2", "selinuxfs", "securityfs", "debugfs", "tracefs"}
_KERNELS |= {"bpf", "pstore", "efivarfs", "configfs", "fusectl", "binfmt_misc"}
#: What systemd mounts into each unit: its credentials, and ways to communicate.
_MANAGERS = (
    r"/run/credentials(/[^/]+)?|/run/systemd/(incoming|notify|journal/[a-z-]+)|/run/host(/.*)?"
)
#: What systemd mounts over hidden files; and a unit's own directories for temporary files.
_HIDDEN, _PRIVATE = r".*/inaccessible/[a-z]+", r".*/systemd-private-[^/]+/tmp"


class Mount(NamedTuple):
    """A mount: ``device`` (major:minor) is the file system, ``root`` the mounted part of it."""

    number: int
    on: int  #: the number of the mount that it is mounted on
    device: str
    root: str
    place: str
    writable: bool
    kind: str


def mounts(pid: int | str) -> list[Mount]:
    """The visible mounts of a process. Raises OSError if it has ended."""
    # Users name some of them: the kernel escapes what parts fields and lines, and no other octet.
    lines = os.fsdecode(Path(f"/proc/{pid}/mountinfo").read_bytes()).split("\n")[:-1]
    found = {mount.number: mount for mount in map(_mount, lines)}
    covered = {
        mount.on
        for mount in found.values()
        if mount.on in found and found[mount.on].place == mount.place
    }
    return [mount for number, mount in found.items() if number not in covered]


def _mount(line: str) -> Mount:
    before, _, after = line.partition(" - ")
    number, on, device, root, place, options = before.split(" ")[:6]
    kind, _, of_the_whole = after.split(" ", 2)
    writable = "rw" in options.split(",") and "rw" in of_the_whole.split(",")
    return Mount(int(number), int(on), device, _unescaped(root), _unescaped(place), writable, kind)


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def in_sight(pid: int, visible: Sequence[Mount]) -> list[str]:
    """What a process sees of the machine and should not see, in words."""
    machines = {mount.device for mount in mounts("self")}
    # A file system that the machine does not have was made for this process.
    wrong = (_wrong(pid, mount) for mount in visible if mount.device in machines)
    return [printable(text) for text in wrong if text]


def _wrong(pid: int, mount: Mount) -> str:
    place = mount.place
    if re.fullmatch(_HIDDEN, mount.root) or re.fullmatch(_PRIVATE, mount.root):
        return ""
    if mount.writable and mount.kind != "proc":
        return f"{place}, which it shares with the machine, can be written to"
    if mount.kind in _KERNELS or re.fullmatch(_MANAGERS, place):
        return ""
    theirs, ours = f"/proc/{pid}/root{place}", place
    if place == "/":
        return "its root is the machine's" if _same(theirs, ours) else ""
    if any(PurePosixPath(place).is_relative_to(path) for path in _SAME):
        # It must not be something else in that place.
        return "" if _same(theirs, ours) else f"{place} is not what it is on the machine"
    return f"{place}, of the machine's"


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except FileNotFoundError:
        return False
