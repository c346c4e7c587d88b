"""What keyd gives up once the keys are loaded, and the locking of its memory before that.

Called by keyd's main function and by ``keyd make``: as root, or, with less to give up, as the
user that a service manager chose. Nobody is trusted yet: no request has been read.
"""

import sys
from typing import NamedTuple

import prctl

from keyd.linux.credentials import (
    allow_many_descriptors,
    become,
    enter_empty_root,
    forbid_core_dumps,
    forbid_regaining,
    hide_memory,
    keep_capabilities,
    lock_memory,
    lock_memory_meanwhile,
)
from keyd.linux.namespaces import leave_namespaces
from keyd.linux.process import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWUTS

__all__ = [
    "CannotLock",
    "Confinement",
    "confine",
    "confine_unprivileged",
    "lock_before_keys",
]


class Confinement(NamedTuple):
    """How keyd is confined once the keys are loaded."""

    uid: int
    gid: int
    chroot: str
    #: Whether keyd refuses to serve where its memory cannot be locked.
    must_lock: bool


class CannotLock(Exception):
    """Memory has to be locked and cannot be; the text says why, and what to do about it."""


def confine_unprivileged(must_lock: bool) -> bool:
    """Confine a keyd that was never root, as far as it can; raises OSError, CannotLock.

    The service manager that started it has to take network and files away, and sets
    the limit on locked memory (RLIMIT_MEMLOCK). Returns whether all memory is locked.
    """
    forbid_core_dumps()
    allow_many_descriptors()
    prctl.set_no_new_privs(1)
    hide_memory()
    return _lock_memory(must_lock)


def confine(to: Confinement) -> bool:
    """Leave the network, the file system and every privilege behind; raises OSError, CannotLock.

    The filter comes later, once there are threads. Returns whether future memory is
    locked, too.
    """
    leave_namespaces(CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    forbid_core_dumps()
    allow_many_descriptors()
    locked = _lock_memory(to.must_lock)
    last_needed = {prctl.CAP_SYS_CHROOT, prctl.CAP_SETUID, prctl.CAP_SETGID, prctl.CAP_SETPCAP}
    keep_capabilities(last_needed)
    enter_empty_root(to.chroot)
    forbid_regaining(last_needed)
    become(to.uid, to.gid)
    # After become(): a change of uid resets the flag.
    hide_memory()
    return locked


def lock_before_keys(required: bool) -> None:
    """Lock memory before a key is read: what was swapped out once stays on the disk.

    Where it cannot be locked, raises CannotLock if it is ``required``.
    """
    try:
        lock_memory_meanwhile()
    except OSError as error:
        if required:
            raise _cannot_lock(error) from None


def _lock_memory(required: bool) -> bool:
    """Lock memory for good; returns whether future memory is locked, too.

    Where it cannot be locked, raises CannotLock if it is ``required``.
    """
    try:
        return lock_memory()
    except OSError as error:
        if required:
            raise _cannot_lock(error) from None
        print(f"keyd: {_why_unlocked(error)}; the keys may be swapped out", file=sys.stderr)
        return False


def _cannot_lock(error: OSError) -> CannotLock:
    return CannotLock(
        f'{_why_unlocked(error)}; lock_memory = "try" (--lock-memory=try) has keyd serve anyhow'
    )


def _why_unlocked(error: OSError) -> str:
    return (
        f"memory cannot be locked ({error.strerror}): this takes CAP_IPC_LOCK or a higher "
        "RLIMIT_MEMLOCK (LimitMEMLOCK=)"
    )
