"""Denying every right that Landlock knows of, but for what is to be read (landlock(7)).

Where there is an empty root and a system call filter, they deny these rights already; this is a
second barrier.
"""

import ctypes
import os
import struct
from functools import cache

__all__ = ["allow_reading", "make_ruleset", "restrict_self", "version"]

_SYS_CREATE_RULESET = 444
_SYS_ADD_RULE = 445
_SYS_RESTRICT_SELF = 446
_CREATE_RULESET_VERSION = 1
#: struct landlock_ruleset_attr: handled_access_fs, handled_access_net, scoped.
_RULESET_ATTR = struct.Struct("=QQQ")
#: struct landlock_path_beneath_attr: allowed_access, parent_fd; its type, and the right to read a
#: file.
_PATH_BENEATH_ATTR = struct.Struct("=Qi")
_RULE_PATH_BENEATH = 1
_READ_FILE = 1 << 2
#: By version of the interface: how many file system rights, network rights and scopes
#: it knows, and how many octets of the structure.
_RIGHTS = {
    1: (13, 0, 0, 8), 2: (14, 0, 0, 8), 3: (15, 0, 0, 8), 4: (15, 2, 0, 16),
    5: (16, 2, 0, 16), 6: (16, 2, 2, 24),
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


@cache
def version() -> int:
    """The version of the kernel's Landlock interface, 0 where it has none or it is off."""
    found: int = _libc.syscall(_SYS_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    return max(0, found)


def make_ruleset(network: bool = True) -> int:
    """A ruleset that handles every right and grants none: a descriptor, close-on-exec.

    Without ``network``, it leaves the network as it is. Raises OSError.
    """
    rights, network_rights, scopes, octets = _RIGHTS[min(version(), max(_RIGHTS))]
    handled = network_rights if network else 0
    attr = _RULESET_ATTR.pack((1 << rights) - 1, (1 << handled) - 1, (1 << scopes) - 1)
    descriptor: int = _libc.syscall(_SYS_CREATE_RULESET, attr, octets, 0)
    if descriptor < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"landlock_create_ruleset: {os.strerror(error)}")
    return descriptor


def allow_reading(ruleset: int, directory: str) -> None:
    """Let files in this directory, and below it, be read. Raises OSError."""
    descriptor = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    try:
        attr = _PATH_BENEATH_ATTR.pack(_READ_FILE, descriptor)
        if _libc.syscall(_SYS_ADD_RULE, ruleset, _RULE_PATH_BENEATH, attr, 0):
            error = ctypes.get_errno()
            raise OSError(error, f"landlock_add_rule: {os.strerror(error)}")
    finally:
        os.close(descriptor)


def restrict_self(ruleset: int) -> None:
    """Limit this process, for good, to the rights that the ruleset grants; raises OSError.

    Needs no_new_privs.
    """
    if _libc.syscall(_SYS_RESTRICT_SELF, ruleset, 0):
        error = ctypes.get_errno()
        raise OSError(error, f"landlock_restrict_self: {os.strerror(error)}")
