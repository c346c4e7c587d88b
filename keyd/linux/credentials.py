"""Giving privileges up (credentials(7), capabilities(7), prctl(2), getrlimit(2)).

Run by each process as it gives up what it does not need. Every function either does
what it says or raises OSError; then the caller must not go on.
"""

import os
import struct
from collections.abc import Iterable, Mapping, Sequence

from keyd.linux import prctl
from keyd.linux.calls import address, call
from keyd.linux.limits import (
    RLIM_INFINITY,
    RLIMIT_CORE,
    RLIMIT_MEMLOCK,
    RLIMIT_NOFILE,
    get_limit,
    set_limit,
)

__all__ = [
    "allow_many_descriptors",
    "become",
    "become_with",
    "controllable_speculation",
    "enter_empty_root",
    "forbid_core_dumps",
    "forbid_regaining",
    "give_up_capabilities",
    "hide_memory",
    "keep_capabilities",
    "limit",
    "lock_memory",
    "lock_memory_meanwhile",
    "permitted_capabilities",
    "stop_speculation",
]

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
#: capset(2): version 3, this process; effective, permitted, inheritable, low halves first.
_HEADER = struct.pack("=Ii", 0x2008_0522, 0)
_SETS = struct.Struct("=6I")


def enter_empty_root(directory: str) -> None:
    """chroot(2) into an empty directory, and make it the working directory."""
    os.chdir(directory)
    if os.listdir("."):
        raise PermissionError(f"{directory} is not empty")
    os.chroot(".")
    os.chdir("/")


def keep_capabilities(kept: Iterable[int]) -> None:
    """Drop all capabilities but these (by number), now and from now on.

    The bounding, permitted and effective sets are cut down to them; the inheritable and
    ambient sets are emptied. The process gains no capability that it did not have. Needs
    CAP_SETPCAP.
    """
    kept = set(kept)
    capability = 0
    while prctl.is_known(capability):  # up to the kernel's last
        if capability not in kept:
            prctl.drop_bounding(capability)
        capability += 1
    prctl.clear_ambient()
    _set_capabilities(kept)


def give_up_capabilities(kept: Iterable[int]) -> None:
    """Give up all capabilities but these (by number), whoever this process runs as."""
    prctl.clear_ambient()
    _set_capabilities(kept)


def _set_capabilities(kept: Iterable[int]) -> None:
    """Those of the permitted set that are among these become permitted and effective; no others."""
    wanted = sum(1 << capability for capability in set(kept))
    _, permitted_low, _, _, permitted_high, _ = _capabilities()
    low, high = permitted_low & wanted & 0xFFFF_FFFF, permitted_high & wanted >> 32
    sets = _SETS.pack(low, low, 0, high, high, 0)
    call("capset", address(_HEADER), address(sets))


def permitted_capabilities() -> set[int]:
    """The capabilities, by number, that this process has or can have at any time (capget(2))."""
    _, permitted_low, _, _, permitted_high, _ = _capabilities()
    permitted = permitted_low | permitted_high << 32
    return {number for number in range(64) if permitted >> number & 1}


def _capabilities() -> tuple[int, ...]:
    found = bytearray(_SETS.size)
    call("capget", address(_HEADER), address(found))
    return _SETS.unpack(found)


def forbid_regaining(bounding: Iterable[int], keep_caps: bool = False) -> None:
    """Close the ways back to a capability, before ``become`` gives the last one up.

    The bounding set, which here holds at most ``bounding``, is emptied. From now on, uid 0
    gives no capability, and no capability can become ambient, nor outlast a change of uid unless
    ``keep_caps`` says so (SECBIT_KEEP_CAPS: permitted ones do then). None of this can be undone
    (capabilities(7), "The securebits flags"). Needs CAP_SETPCAP.
    """
    for capability in bounding:
        prctl.drop_bounding(capability)
    prctl.set_securebits(
        prctl.SECBIT_NOROOT
        | prctl.SECBIT_NOROOT_LOCKED
        # Locked while it is off: so a change of uid still drops capabilities.
        | prctl.SECBIT_NO_SETUID_FIXUP_LOCKED
        | (prctl.SECBIT_KEEP_CAPS if keep_caps else 0)
        | prctl.SECBIT_KEEP_CAPS_LOCKED
        | prctl.SECBIT_NO_CAP_AMBIENT_RAISE
        | prctl.SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED,
    )


def become(uid: int, gid: int, groups: Sequence[int] = ()) -> None:
    """Become this user, and of these groups alone, for good: real, effective and saved.

    All capabilities are lost with uid 0 (capabilities(7), "Effect of user ID changes on
    capabilities"). Sets no_new_privs as well.
    """
    os.setgroups(list(groups))
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    prctl.set_no_new_privs(1)


def become_with(uid: int, gid: int, kept: Iterable[int], groups: Sequence[int] = ()) -> None:
    """Become this user, and of these groups alone, for good; keep these capabilities (by number).

    There is no way to others: the bounding, inheritable and ambient sets are empty, uid 0 would
    give none. Sets no_new_privs as well. Needs CAP_SETUID, CAP_SETGID and CAP_SETPCAP.
    """
    meanwhile = {*kept, prctl.CAP_SETUID, prctl.CAP_SETGID, prctl.CAP_SETPCAP}
    keep_capabilities(meanwhile)
    forbid_regaining(meanwhile, keep_caps=True)
    become(uid, gid, groups)
    _set_capabilities(kept)


def hide_memory() -> None:
    """Become non-dumpable: no core dump, no ptrace(2), /proc/PID is root's (prctl(2)).

    Call this after the last change of uid, which resets the flag.
    """
    prctl.set_dumpable(False)


def lock_memory() -> bool:
    """Keep this process's memory from being swapped out, present and future memory.

    Needs CAP_IPC_LOCK. Once that is given up, future memory counts against RLIMIT_MEMLOCK,
    and raising that limit takes CAP_SYS_RESOURCE. Where the limit cannot be raised, only
    present memory is locked, and False is returned.
    """
    flags = _MCL_CURRENT | _MCL_ONFAULT
    try:
        set_limit(RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)
        flags |= _MCL_FUTURE
    except OSError:
        pass
    call("mlockall", flags)
    return bool(flags & _MCL_FUTURE)


def lock_memory_meanwhile() -> None:
    """The same until ``lock_memory``, and for future memory whatever the limit is.

    CAP_IPC_LOCK allows that for as long as it is there. Without it, and with a limit, only present
    memory is locked: more than the limit could not be had at all.
    """
    flags = _MCL_CURRENT | _MCL_ONFAULT
    if (
        prctl.CAP_IPC_LOCK in permitted_capabilities()
        or get_limit(RLIMIT_MEMLOCK)[0] == RLIM_INFINITY
    ):
        flags |= _MCL_FUTURE
    call("mlockall", flags)


def forbid_core_dumps() -> None:
    """Set RLIMIT_CORE to zero, soft and hard."""
    set_limit(RLIMIT_CORE, 0, 0)


def allow_many_descriptors() -> int:
    """Raise RLIMIT_NOFILE as far as it goes; returns how far."""
    _, hard = get_limit(RLIMIT_NOFILE)
    set_limit(RLIMIT_NOFILE, hard, hard)
    return hard


def limit(limits: Mapping[int, int]) -> None:
    """Set resource limits, soft and hard."""
    for resource, value in limits.items():
        set_limit(resource, value, value)


def controllable_speculation() -> tuple[int, ...]:
    """The speculation features that this kernel and machine let a process turn off."""
    found = []
    for feature in (prctl.SPEC_STORE_BYPASS, prctl.SPEC_INDIRECT_BRANCH):
        try:
            if prctl.get_speculation_ctrl(feature) & prctl.SPEC_PRCTL:
                found.append(feature)
        except OSError:
            continue  # this kernel does not know of it
    return tuple(found)


def stop_speculation(features: Iterable[int]) -> None:
    """Turn these features off for good (PR_SPEC_FORCE_DISABLE)."""
    for feature in features:
        prctl.set_speculation_ctrl(feature, prctl.SPEC_FORCE_DISABLE)
