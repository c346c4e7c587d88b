"""What workers inherit, on huge pages, where the kernel can do that at once (Linux 6.1 and later).

Run by the fork server, last of all before it forks. A fork copies an entry for each page that is
inherited. A huge page has one entry, and not 512, until somebody writes to it: then it is split.
What is inherited is in one heap, the C library's (``titus_py/parent/forks.py``). Its ends are moved
to where huge pages begin. What workers allocate comes from behind the last of these.
"""

import re
from contextlib import suppress
from typing import NamedTuple

from keyd.linux.calls import call
from keyd.linux.memory import (
    MAP_ANONYMOUS,
    MAP_FIXED_NOREPLACE,
    MAP_PRIVATE,
    PROT_READ,
    PROT_WRITE,
)
from titus_py.fork_server.heap import extend, give_room

__all__ = ["Filled", "fill_up", "heap", "open_up", "use_huge_pages"]

_OCTETS = 2 << 20
#: madvise(2). It does so whatever /sys/kernel/mm/transparent_hugepage/enabled says.
_MADV_COLLAPSE = 25
_HEAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p .*\[heap\]$", re.MULTILINE)
#: The least that is allocated to have the heap end where a huge page does.
_LEAST = 64 * 1024


def heap() -> range:
    """The addresses of the C library's heap (proc_pid_maps(5)); empty if it has none."""
    with open("/proc/self/maps", encoding="ascii", errors="replace") as file:
        maps = file.read()
    found = _HEAP.search(maps)
    return range(int(found[1], 16), int(found[2], 16)) if found else range(0)


class Filled(NamedTuple):
    """A heap that was extended: what is in use of it, and what of that is kept free."""

    place: range
    room: range


def fill_up(place: range, room: int = _LEAST) -> Filled:
    """Extend the heap, which was there, so that it begins and ends where huge pages begin.

    At its end, at least ``room`` octets are kept free. Where it cannot be extended, it stays as it
    is. Holes that this leaves are for ``fill_holes``.
    """
    first, last = extend(room, _OCTETS) if place else (0, 0)
    if not first:
        return Filled(place, range(0))
    start = place.start
    below = start % _OCTETS
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    # Where something is there, it begins where it did.
    with suppress(OSError):
        if below:
            start = call("mmap", start - below, below, PROT_READ | PROT_WRITE, flags, -1, 0)
    return Filled(range(start, last), range(first, last))


def open_up(filled: Filled) -> range:
    """Have what is allocated next come from what was kept free; returns where that is."""
    give_room(filled.room.start)
    return filled.room


def use_huge_pages(place: range) -> int:
    """Put this place on huge pages, as far as it fills any; returns how many there are.

    Where the kernel cannot, all stays as it is.
    """
    first = -(-place.start // _OCTETS) * _OCTETS
    pages = range(first, place.stop - _OCTETS + 1, _OCTETS)
    # Each call waits for all processors, however much it collapses.
    if _collapse(first, len(pages) * _OCTETS):
        return len(pages)
    return sum(_collapse(at, _OCTETS) for at in pages)


def _collapse(start: int, octets: int) -> bool:
    try:
        call("madvise", start, octets, _MADV_COLLAPSE)
    except OSError:
        return False
    return True
