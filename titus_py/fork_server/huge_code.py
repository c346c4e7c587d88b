"""Code and constants on huge pages, where the kernel can do that at once (Linux 6.1 and later).

Run by the fork server, before it confines itself. A worker has a page fault for each 64 KiB of code
that it comes to, and its end clears an entry for each page of that. For 2 MiB of a huge page, it is
one of each. The kernel has files on huge pages only where they are in memory: so the code is copied
to such a file, which is mapped in the old one's place. Nobody can write to it, nor map it to be
written to, root included: it is sealed (memfd_create(2)). A worker's code is no more its own than
before.

Constants on a huge page with code become executable, too; those that fill one do not.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

from keyd.linux.calls import call, memory
from keyd.linux.memory import MAP_FIXED, MAP_PRIVATE, PROT_EXEC, PROT_READ, map_private
from keyd.linux.sealed import sealed_file
from titus_py.fork_server.files import Mapped, unchanged

__all__ = ["use_huge_pages_for_code"]

_OCTETS = 2 << 20
_MADV_COLLAPSE = 25
#: Of constants and of code. Between these and its data, a library may have a gap that nobody reads.
_PERMISSIONS = "r--p", "r-xp"


def use_huge_pages_for_code() -> int:
    """Put code on huge pages, as far as it fills any; returns how many there are.

    Where the kernel cannot, all stays as it is.
    """
    count = 0
    for parts in list(_files()):
        code = [one.place for one in parts if "x" in one.permissions]
        place = range(_up(parts[0].place.start), _down(parts[-1].place.stop))
        if code and place:
            with suppress(OSError):
                _replace(place, code)
                count += len(place) // _OCTETS
    return count


def _files() -> Iterator[list[Mapped]]:
    """The mappings of each file that follow each other, and can be read and not written to."""
    parts: list[Mapped] = []
    for one in unchanged():
        if one.permissions not in _PERMISSIONS:
            continue
        follows = parts and (parts[-1].file, parts[-1].place.stop) == (one.file, one.place.start)
        if parts and not follows:
            yield parts
            parts = []
        parts.append(one)
    if parts:
        yield parts


def _replace(place: range, code: Sequence[range]) -> None:
    """Map a copy of what is there in its place. Raises OSError; all that is mapped is the same."""
    copy = sealed_file("code", memory(place.start, len(place)))
    try:
        _collapse(copy, len(place))
        for at in range(place.start, place.stop, _OCTETS):
            runs = any(one.start < at + _OCTETS and at < one.stop for one in code)
            protection = PROT_READ | (PROT_EXEC if runs else 0)
            flags, offset = MAP_PRIVATE | MAP_FIXED, at - place.start
            call("mmap", at, _OCTETS, protection, flags, copy, offset)
    finally:
        os.close(copy)


def _collapse(file: int, octets: int) -> None:
    """Have all of a memory file on huge pages. Raises OSError."""
    room = map_private(octets + _OCTETS)
    start = _up(room)
    try:
        call("mmap", start, octets, PROT_READ, MAP_PRIVATE | MAP_FIXED, file, 0)
        call("madvise", start, octets, _MADV_COLLAPSE)
    finally:
        call("munmap", room, octets + _OCTETS)


def _down(address: int) -> int:
    return address // _OCTETS * _OCTETS


def _up(address: int) -> int:
    return _down(address + _OCTETS - 1)
