"""Denying every right that Landlock knows of, but for what is to be read (landlock(7)).

Where there is an empty root and a system call filter, they deny these rights already; this is a
second barrier.
"""

import os
import stat
import struct
from functools import cache

from keyd.linux.calls import address, call

__all__ = ["allow_reading", "allow_using", "make_ruleset", "restrict_self", "version"]

_CREATE_RULESET_VERSION = 1
#: struct landlock_ruleset_attr: handled_access_fs, handled_access_net, scoped.
_RULESET_ATTR = struct.Struct("=QQQ")
#: struct landlock_path_beneath_attr: allowed_access, parent_fd; its type, and the right to read a
#: file.
_PATH_BENEATH_ATTR = struct.Struct("=Qi")
_RULE_PATH_BENEATH = 1
_READ_FILE = 1 << 2
#: The rights that ``allow_using`` grants for what is in a directory, as far as the kernel knows
#: them: to read and list, and to write, make, rename and remove files and directories, and to
#: control devices. Not: to execute, nor to make anything else.
_READ_DIR = 1 << 3
_WRITING = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 13 | 1 << 14 | 1 << 15
#: Of these, the rights that a file has, too.
_OF_FILES = 1 << 1 | _READ_FILE | 1 << 14 | 1 << 15
#: By version of the interface: how many file system rights, network rights and scopes
#: it knows, and how many octets of the structure.
_RIGHTS = {
    1: (13, 0, 0, 8), 2: (14, 0, 0, 8), 3: (15, 0, 0, 8), 4: (15, 2, 0, 16),
    5: (16, 2, 0, 16), 6: (16, 2, 2, 24),
}  # fmt: skip


@cache
def version() -> int:
    """The version of the kernel's Landlock interface, 0 where it has none or it is off."""
    try:
        return call("landlock_create_ruleset", 0, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


def make_ruleset(network: bool = True) -> int:
    """A ruleset that handles every right and grants none: a descriptor, close-on-exec.

    Without ``network``, it leaves the network as it is. Raises OSError.
    """
    rights, network_rights, scopes, octets = _RIGHTS[min(version(), max(_RIGHTS))]
    handled = network_rights if network else 0
    attr = _RULESET_ATTR.pack((1 << rights) - 1, (1 << handled) - 1, (1 << scopes) - 1)
    return call("landlock_create_ruleset", address(attr), octets, 0)


def allow_reading(ruleset: int, directory: str) -> None:
    """Let files in this directory, and below it, be read. Raises OSError."""
    _allow(ruleset, directory, _READ_FILE)


def allow_using(ruleset: int, path: str, writing: bool) -> None:
    """Let a file or device, or what is in a directory, be read, listed and, if so, written.

    Raises OSError.
    """
    known = (1 << _RIGHTS[min(version(), max(_RIGHTS))][0]) - 1
    _allow(ruleset, path, (_READ_FILE | _READ_DIR | (_WRITING if writing else 0)) & known)


def _allow(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _OF_FILES
        attr = _PATH_BENEATH_ATTR.pack(rights, descriptor)
        call("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, address(attr), 0)
    finally:
        os.close(descriptor)


def restrict_self(ruleset: int) -> None:
    """Limit this process, for good, to the rights that the ruleset grants; raises OSError.

    Needs no_new_privs.
    """
    call("landlock_restrict_self", ruleset, 0)
