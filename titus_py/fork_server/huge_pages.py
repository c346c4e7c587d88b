"""What workers inherit, on huge pages, where the kernel can do that at once (Linux 6.1 and later).

Run by the fork server, last of all before it forks. A fork copies an entry for each page that is
inherited. A huge page has one entry, and not 512, until somebody writes to it: then it is split.
What is inherited is in one heap, the C library's (``titus_py/parent/forks.py``). Its ends are moved
to where huge pages begin. What workers allocate comes from behind the last of these.
"""

import ctypes
import re
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, PROT_READ, PROT_WRITE
from pathlib import Path

__all__ = ["fill_up", "heap", "use_huge_pages", "use_one_heap"]

_OCTETS = 2 << 20
#: <malloc.h>
_M_MMAP_MAX = -4
#: madvise(2). It does so whatever /sys/kernel/mm/transparent_hugepage/enabled says.
_MADV_COLLAPSE = 25
#: mmap(2): there and nowhere else, unless something is there.
_MAP_FIXED_NOREPLACE = 0x100000
_HEAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p .*\[heap\]$", re.MULTILINE)
#: Of blocks that are allocated until one comes from the end of the heap.
_LARGE = 64 * 1024
_libc = ctypes.CDLL(None)


def use_one_heap() -> None:
    """Have no mapping made for a large block, from now on: all comes from the heap."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_MMAP_MAX, 0)


def heap() -> range:
    """The addresses of the C library's heap (proc_pid_maps(5)); empty if it has none."""
    maps = Path("/proc/self/maps").read_text(encoding="ascii", errors="replace")
    found = _HEAP.search(maps)
    return range(int(found[1], 16), int(found[2], 16)) if found else range(0)


def fill_up(place: range) -> range:
    """Extend the heap, which was there, so that it begins, and is free, where huge pages begin.

    Returns what is in use of it. Where it cannot be extended, it stays as it is. Holes that this
    leaves are for ``fill_holes``.
    """
    malloc, free, sbrk, map_memory = _libc.malloc, _libc.free, _libc.sbrk, _libc.mmap
    malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    free.argtypes, free.restype = [ctypes.c_void_p], None
    sbrk.argtypes, sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
    map_memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    map_memory.restype = ctypes.c_void_p
    if not place:
        return place
    end = sbrk(0)
    # Until there is no other hole of this size.
    while (last := malloc(_LARGE)) is not None and last + _LARGE <= end:
        pass
    free(last)
    # Where something else lies behind the heap, the C library goes on elsewhere.
    if last is None or last >= sbrk(0):
        return place
    length = _LARGE + -(last + _LARGE) % _OCTETS
    # What Python allocates meanwhile may lie between.
    if (extended := malloc(length)) is None or not last <= extended < last + PAGESIZE:
        free(extended)
        return place
    below = place.start % _OCTETS
    flags = MAP_PRIVATE | MAP_ANONYMOUS | _MAP_FIXED_NOREPLACE
    start = place.start - below
    if map_memory(start, below, PROT_READ | PROT_WRITE, flags, -1, 0) != start:
        start = place.start
    return range(start, last + length)


def use_huge_pages(place: range) -> int:
    """Put this place on huge pages, as far as it fills any; returns how many there are.

    Where the kernel cannot, all stays as it is.
    """
    madvise = _libc.madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    first = -(-place.start // _OCTETS) * _OCTETS
    pages = range(first, place.stop - _OCTETS + 1, _OCTETS)
    # Each call waits for all processors, however much it collapses.
    if madvise(first, len(pages) * _OCTETS, _MADV_COLLAPSE) == 0:
        return len(pages)
    return sum(madvise(at, _OCTETS, _MADV_COLLAPSE) == 0 for at in pages)
