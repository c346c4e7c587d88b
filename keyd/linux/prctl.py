"""prctl(2), and numbers of capabilities (capabilities(7)), for what workers are forked from.

Used by the fork server, and by what it shares with others. All else has python-prctl: that is a
library, with libcap, whose ten mappings each fork would copy.
"""

import errno

from keyd.linux.calls import address, call

# <linux/capability.h>
CAP_KILL = 5
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_NET_RAW = 13
CAP_IPC_LOCK = 14
CAP_SYS_CHROOT = 18
CAP_SYS_ADMIN = 21

# <linux/securebits.h>
SECBIT_NOROOT, SECBIT_NOROOT_LOCKED = 1 << 0, 1 << 1
SECBIT_NO_SETUID_FIXUP, SECBIT_NO_SETUID_FIXUP_LOCKED = 1 << 2, 1 << 3
SECBIT_KEEP_CAPS, SECBIT_KEEP_CAPS_LOCKED = 1 << 4, 1 << 5
SECBIT_NO_CAP_AMBIENT_RAISE, SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED = 1 << 6, 1 << 7

# <linux/prctl.h>
SPEC_STORE_BYPASS, SPEC_INDIRECT_BRANCH = 0, 1
SPEC_PRCTL, SPEC_FORCE_DISABLE = 1 << 0, 1 << 3
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_NAME = 1, 4, 15
_CAPBSET_READ, _CAPBSET_DROP, _SET_SECUREBITS = 23, 24, 28
_SET_NO_NEW_PRIVS = 38
_CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL = 47, 4
_GET_SPECULATION_CTRL, _SET_SPECULATION_CTRL = 52, 53


def set_pdeathsig(signal: int) -> None:
    """Have this signal sent to the process when its parent ends."""
    _prctl(_SET_PDEATHSIG, signal)


def set_dumpable(dumpable: bool) -> None:
    _prctl(_SET_DUMPABLE, int(dumpable))


def set_name(name: str) -> None:
    """Set the short name, at most 15 octets."""
    text = name.encode() + b"\0"
    _prctl(_SET_NAME, address(text))


def set_no_new_privs(forbidden: int) -> None:
    _prctl(_SET_NO_NEW_PRIVS, forbidden)


def set_securebits(bits: int) -> None:
    _prctl(_SET_SECUREBITS, bits)


def is_known(capability: int) -> bool:
    """Whether the kernel has it. Raises OSError if it does not say so."""
    try:
        _prctl(_CAPBSET_READ, capability)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def drop_bounding(capability: int) -> None:
    _prctl(_CAPBSET_DROP, capability)


def clear_ambient() -> None:
    _prctl(_CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL)


def get_speculation_ctrl(feature: int) -> int:
    return _prctl(_GET_SPECULATION_CTRL, feature)


def set_speculation_ctrl(feature: int, control: int) -> None:
    _prctl(_SET_SPECULATION_CTRL, feature, control)


def _prctl(option: int, argument: int, further: int = 0) -> int:
    """Raises OSError."""
    return call("prctl", option, argument, further, 0, 0)
