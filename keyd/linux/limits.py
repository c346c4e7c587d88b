"""Resource limits (getrlimit(2)).

Python's own module is a library, whose mappings each fork would copy.
"""

import struct

from keyd.linux.calls import address, call

__all__ = [
    "RLIMIT_AS",
    "RLIMIT_CORE",
    "RLIMIT_FSIZE",
    "RLIMIT_MEMLOCK",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_NOFILE",
    "RLIMIT_NPROC",
    "RLIMIT_RTPRIO",
    "RLIMIT_SIGPENDING",
    "RLIM_INFINITY",
    "get_limit",
    "set_limit",
]

RLIMIT_FSIZE, RLIMIT_CORE = 1, 4
RLIMIT_NPROC, RLIMIT_NOFILE, RLIMIT_MEMLOCK, RLIMIT_AS = 6, 7, 8, 9
RLIMIT_SIGPENDING, RLIMIT_MSGQUEUE, RLIMIT_NICE, RLIMIT_RTPRIO = 11, 12, 13, 14
RLIM_INFINITY = (1 << 64) - 1
#: struct rlimit64: soft and hard.
_LIMIT = struct.Struct("=QQ")


def get_limit(resource: int) -> tuple[int, int]:
    """This process's limit, soft and hard."""
    found = bytearray(_LIMIT.size)
    call("prlimit64", 0, resource, 0, address(found))
    soft, hard = _LIMIT.unpack(found)
    return soft, hard


def set_limit(resource: int, soft: int, hard: int) -> None:
    """Set this process's limit. Raises OSError."""
    wanted = _LIMIT.pack(soft, hard)
    call("prlimit64", 0, resource, address(wanted), 0)
