"""Denying every right that Landlock knows of (landlock(7)).

The empty root and the system call filter deny them already; this is a second barrier.
"""

import ctypes
import os
import struct
from functools import cache

__all__ = ["make_ruleset", "restrict_self", "version"]

_SYS_CREATE_RULESET = 444
_SYS_RESTRICT_SELF = 446
_CREATE_RULESET_VERSION = 1
#: struct landlock_ruleset_attr: handled_access_fs, handled_access_net, scoped.
_RULESET_ATTR = struct.Struct("=QQQ")
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


def make_ruleset() -> int:
    """A ruleset that handles every right and grants none: a descriptor, close-on-exec.

    Raises OSError.
    """
    rights, network, scopes, octets = _RIGHTS[min(version(), max(_RIGHTS))]
    attr = _RULESET_ATTR.pack((1 << rights) - 1, (1 << network) - 1, (1 << scopes) - 1)
    descriptor: int = _libc.syscall(_SYS_CREATE_RULESET, attr, octets, 0)
    if descriptor < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"landlock_create_ruleset: {os.strerror(error)}")
    return descriptor


def restrict_self(ruleset: int) -> None:
    """Limit this process, for good, to the rights that the ruleset grants; raises OSError.

    Needs no_new_privs.
    """
    if _libc.syscall(_SYS_RESTRICT_SELF, ruleset, 0):
        error = ctypes.get_errno()
        raise OSError(error, f"landlock_restrict_self: {os.strerror(error)}")
