"""Which pages of its memory a process has in use (/proc/PID/pagemap; proc(5)).

Run by what looks for keys in memory, as root. A process may have terabytes of addresses and next to
nothing there: AddressSanitizer does that, and so do some runtimes of languages. Since Linux 6.7 the
kernel skips what is empty (PAGEMAP_SCAN). What it finds is then read from pagemap, as everything is
on older kernels: so both ways tell the same. It trusts the kernel.
"""

import ctypes
import errno
import fcntl
import os
import re
import sys
from collections.abc import Iterator

__all__ = ["PAGE", "in_use"]

PAGE = os.sysconf("SC_PAGE_SIZE")
#: 8 octets a page. In the last octet, 0x80 is "present", 0x40 is "swapped", and 0x04 is "guard": a
#: page that is there so that nobody can read it.
_ENTRY = 8
_IN_USE = bytes(bool(entry & 0xC0) and not entry & 0x04 for entry in range(256))
_RUN = re.compile(b"\x01+")
#: So many pages have their entries in one page of the page tables.
_TABLE_PAGES = PAGE // 8
#: How many pages are looked at together where the kernel does not skip what is empty.
_BLOCK_PAGES = 64 * 1024
#: The entries of so many pages that are not there; the kernel may have each of them "soft-dirty".
_EMPTY = tuple(each.to_bytes(_ENTRY, sys.byteorder) * _BLOCK_PAGES for each in (0, 1 << 55))

#: linux/fs.h: _IOWR('f', 16, struct pm_scan_arg), and two of the categories that a page may have.
_PAGEMAP_SCAN = 0xC0606610
_PRESENT, _SWAPPED = 1 << 3, 1 << 4


class _Scan(ctypes.Structure):
    """struct pm_scan_arg."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "size",
            "flags",
            "start",
            "end",
            "walk_end",
            "vec",
            "vec_len",
            "max_pages",
            "category_inverted",
            "category_mask",
            "category_anyof_mask",
            "return_mask",
        )
    )


class _Region(ctypes.Structure):
    """struct page_region."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("start", "end", "categories"))


def in_use(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The pages between these addresses, of one mapping, that are present or swapped out.

    Each pair is where some begin and where they end. Raises ProcessLookupError if the process has
    ended.
    """
    at = start
    while at < end:
        found = _next_in_use(pagemap, at, end)
        if found is None:
            count = _BLOCK_PAGES
        elif found < end:
            at, count = found, _TABLE_PAGES - found // PAGE % _TABLE_PAGES
        else:
            # What has ended has nothing in use. Only its entries tell that from what is empty.
            _entries(pagemap, start, 1)
            return
        entries = _entries(pagemap, at, min(count, (end - at) // PAGE))
        # To compare them all at once is much faster than to look at each.
        if entries not in [empty[: len(entries)] for empty in _EMPTY]:
            for run in _RUN.finditer(entries[7::8].translate(_IN_USE)):
                yield at + run.start() * PAGE, at + run.end() * PAGE
        at += len(entries) // _ENTRY * PAGE


def _next_in_use(pagemap: int, start: int, end: int) -> int | None:
    """The first page in use between these addresses; ``end`` if there is none.

    A guard may be taken for one. None: the kernel cannot tell.
    """
    region = _Region()
    scan = _Scan(
        size=ctypes.sizeof(_Scan),
        start=start,
        end=end,
        vec=ctypes.addressof(region),
        vec_len=1,
        max_pages=1,
        category_anyof_mask=_PRESENT | _SWAPPED,
        return_mask=_PRESENT | _SWAPPED,
    )
    try:
        return region.start if fcntl.ioctl(pagemap, _PAGEMAP_SCAN, scan, True) else end
    except OSError:
        # Whatever the reason: what is there is then read as where there is no such call.
        return None


def _entries(pagemap: int, start: int, count: int) -> bytes:
    entries = os.pread(pagemap, count * _ENTRY, start // PAGE * _ENTRY)
    if not entries:
        raise ProcessLookupError(errno.ESRCH, "ended")
    return entries
