"""Which files of the machine are visible in another mount namespace, as systemd makes one.

Run by ``titus-py audit``, as root, for a keyd that is a unit of its own. It trusts the kernel.
What may be visible there is listed here; anything else is too much.
"""

import os
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from keyd.linux.mounts import Mount, mounts, uncovered
from keyd.printable import printable

__all__ = ["in_sight"]

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


def in_sight(pid: int, visible: Sequence[Mount]) -> list[str]:
    """What a process sees of the machine and should not see, in words."""
    machines = {mount.device for mount in uncovered(mounts())}
    # A file system that the machine does not have was made for this process.
    wrong = (_wrong(pid, mount) for mount in visible if mount.device in machines)
    return [printable(text) for text in wrong if text]


def _wrong(pid: int, mount: Mount) -> str:
    place = mount.path
    if re.fullmatch(_HIDDEN, mount.root) or re.fullmatch(_PRIVATE, mount.root):
        return ""
    if mount.is_writable and mount.kind != "proc":
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
