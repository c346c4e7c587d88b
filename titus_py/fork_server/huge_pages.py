"""What workers inherit, on huge pages, where the kernel can do that at once (Linux 6.1 and later).

Run by the fork server, last of all before it forks. A fork copies an entry for each page that is
inherited. A huge page has one entry, and not 512, until somebody writes to it: then it is split.
What workers write to lies together by now (``gathering``, ``holes``).
"""

import ctypes
import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["heaps", "use_huge_pages"]

_OCTETS = 2 << 20
#: madvise(2). It does so whatever /sys/kernel/mm/transparent_hugepage/enabled says.
_MADV_COLLAPSE = 25
#: Private, writable, and no file's: the C library's heap, and what Python has for its own.
_HEAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *(?:\[heap\])?$", re.MULTILINE)
_libc = ctypes.CDLL(None)


def heaps() -> list[range]:
    """The addresses of this process's heaps (proc_pid_maps(5))."""
    maps = Path("/proc/self/maps").read_text(encoding="ascii", errors="replace")
    return [range(int(first, 16), int(end, 16)) for first, end in _HEAP.findall(maps)]


def use_huge_pages(places: Iterable[range]) -> int:
    """Put these places on huge pages, as far as they fill any; returns how many there are.

    Where the kernel cannot, all stays as it is.
    """
    _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return sum(
        _libc.madvise(at, _OCTETS, _MADV_COLLAPSE) == 0
        for place in places
        for at in range(-(-place.start // _OCTETS) * _OCTETS, place.stop - _OCTETS + 1, _OCTETS)
    )
