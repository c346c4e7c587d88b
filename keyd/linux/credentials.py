"""Giving privileges up (credentials(7), capabilities(7), prctl(2)).

Run once by each process that does not need them any more. Every function either
does what it says or raises: the caller must not go on.
"""

import os
import resource

import prctl

__all__ = ["become", "enter_empty_root", "forbid_core_dumps", "hide_memory"]


def enter_empty_root(directory: str) -> None:
    """chroot(2) into an empty directory, and stand in it."""
    os.chdir(directory)
    os.chroot(".")
    os.chdir("/")


def become(uid: int, gid: int) -> None:
    """Be this user and this group alone, for good: real, effective and saved.

    Without any capability: those go with uid 0 (capabilities(7), "Effect of user ID
    changes on capabilities"). Raises OSError or PermissionError.
    """
    prctl.set_keepcaps(False)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if os.getresuid() != (uid,) * 3 or os.getresgid() != (gid,) * 3 or os.getgroups():
        raise PermissionError(f"still {os.getresuid()}, {os.getresgid()}, {os.getgroups()}")
    prctl.set_no_new_privs(1)


def hide_memory() -> None:
    """Be non-dumpable: no core dump, no ptrace(2), /proc/PID root's (prctl(2)).

    After the last change of uid, since that sets the flag again.
    """
    prctl.set_dumpable(False)
    if prctl.get_dumpable():
        raise PermissionError("still dumpable")


def forbid_core_dumps() -> None:
    """RLIMIT_CORE at zero, hard (getrlimit(2))."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
