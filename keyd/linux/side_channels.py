"""Keeping a process's secrets from what runs on the same core (prctl(2), sched(7)).

Run by keyd before it reads a key. Not every kernel and not every machine has these measures,
and some take a boot option: each is put in force where it can be.
"""

import ctypes

import prctl

from keyd.linux.credentials import controllable_speculation, stop_speculation

__all__ = ["guard"]

_libc = ctypes.CDLL(None, use_errno=True)
_NAMES = {
    prctl.SPEC_STORE_BYPASS: "store_bypass",
    prctl.SPEC_INDIRECT_BRANCH: "indirect_branch",
}
# Linux 5.15 and 5.14.
_PR_GET_SPECULATION_CTRL, _PR_SET_SPECULATION_CTRL = 52, 53
_PR_SPEC_L1D_FLUSH = 2
_PR_SPEC_PRCTL, _PR_SPEC_ENABLE = 1 << 0, 1 << 1
_PR_SCHED_CORE, _PR_SCHED_CORE_CREATE, _THREAD_GROUP = 62, 1, 1
_SMT = "/sys/devices/system/cpu/smt/active"


def guard() -> list[str]:
    """Put in force what there is, for this process and all its threads; returns what that was.

    ``store_bypass``, ``indirect_branch``: no such speculation, for good. ``l1d_flush``: the L1
    data cache is flushed when another process gets the core. ``core_scheduling``: no other
    process runs on the same core at the same time. Call this while there is one thread.
    """
    features = controllable_speculation()
    stop_speculation(features)
    found = [_NAMES[feature] for feature in features]
    if _flush_l1d():
        found.append("l1d_flush")
    if not _libc.prctl(_PR_SCHED_CORE, _PR_SCHED_CORE_CREATE, 0, _THREAD_GROUP, None):
        found.append("core_scheduling")
    return found


def _flush_l1d() -> bool:
    """Whether the cache is flushed from now on. It takes the boot option ``l1d_flush=on``."""
    feature = _PR_SPEC_L1D_FLUSH
    state = _libc.prctl(_PR_GET_SPECULATION_CTRL, feature, 0, 0, 0)
    # With SMT on, the kernel would send SIGBUS to a process that has asked for this.
    if state < 0 or not state & _PR_SPEC_PRCTL or _smt_is_on():
        return False
    return not _libc.prctl(_PR_SET_SPECULATION_CTRL, feature, _PR_SPEC_ENABLE, 0, 0)


def _smt_is_on() -> bool:
    try:
        with open(_SMT, encoding="ascii") as file:
            return file.read().strip() != "0"
    except OSError:
        # Nobody knows: as if it were on.
        return True
