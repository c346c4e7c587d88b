"""What a process does to itself with prctl(2), and the numbers of capabilities (capabilities(7)).

Run by each process. Python has no such calls, and what others wrote for it is a library, with
libcap: ten more mappings, which each fork would copy.
"""

from keyd.linux.calls import address, call

# <linux/capability.h>
CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAP_FOWNER = 3
CAP_FSETID = 4
CAP_KILL = 5
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_LINUX_IMMUTABLE = 9
CAP_NET_BIND_SERVICE = 10
CAP_NET_BROADCAST = 11
CAP_NET_ADMIN = 12
CAP_NET_RAW = 13
CAP_IPC_LOCK = 14
CAP_IPC_OWNER = 15
CAP_SYS_MODULE = 16
CAP_SYS_RAWIO = 17
CAP_SYS_CHROOT = 18
CAP_SYS_PTRACE = 19
CAP_SYS_PACCT = 20
CAP_SYS_ADMIN = 21
CAP_SYS_BOOT = 22
CAP_SYS_NICE = 23
CAP_SYS_RESOURCE = 24
CAP_SYS_TIME = 25
CAP_SYS_TTY_CONFIG = 26
CAP_MKNOD = 27
CAP_LEASE = 28
CAP_AUDIT_WRITE = 29
CAP_AUDIT_CONTROL = 30
CAP_SETFCAP = 31
CAP_MAC_OVERRIDE = 32
CAP_MAC_ADMIN = 33
CAP_SYSLOG = 34
CAP_WAKE_ALARM = 35
CAP_BLOCK_SUSPEND = 36
CAP_AUDIT_READ = 37
CAP_PERFMON = 38
CAP_BPF = 39
CAP_CHECKPOINT_RESTORE = 40

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
_SET_CHILD_SUBREAPER, _SET_NO_NEW_PRIVS = 36, 38
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


def set_child_subreaper(is_one: bool) -> None:
    _prctl(_SET_CHILD_SUBREAPER, int(is_one))


def set_no_new_privs(forbidden: int) -> None:
    _prctl(_SET_NO_NEW_PRIVS, forbidden)


def set_securebits(bits: int) -> None:
    _prctl(_SET_SECUREBITS, bits)


def is_known(capability: int) -> bool:
    """Whether the kernel has it."""
    try:
        _prctl(_CAPBSET_READ, capability)
    except OSError:
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
