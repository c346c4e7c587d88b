"""Memory that is mapped (mmap(2)).

Python's own module is a library, whose mappings each fork would copy.
"""

import os

from keyd.linux.calls import call

__all__ = [
    "MAP_ANONYMOUS",
    "MAP_FIXED",
    "MAP_FIXED_NOREPLACE",
    "MAP_PRIVATE",
    "MAP_SHARED",
    "PAGE_OCTETS",
    "PROT_EXEC",
    "PROT_READ",
    "PROT_WRITE",
    "map_private",
]

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x1, 0x2, 0x10, 0x20
#: There and nowhere else, unless something is there.
MAP_FIXED_NOREPLACE = 0x10_0000
PAGE_OCTETS = os.sysconf("SC_PAGESIZE")


def map_private(octets: int) -> int:
    """Map so many zeros, to be written to; returns where. Nobody unmaps them. Raises OSError."""
    return call("mmap", 0, octets, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
