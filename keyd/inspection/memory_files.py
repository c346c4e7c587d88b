"""Files in memory that a process has open, and need not have mapped (memfd_create(2)).

Run by what looks for keys in memory, as root. What is in them is in no process's memory. It trusts
the kernel: such a file is known by the mount that it is on, the kernel's own, where nobody can make
others. What is elsewhere is not touched: it may hang, or do something.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import NamedTuple

from keyd.inspection.mappings import Mapping
from keyd.inspection.open_files import name_of, opened
from keyd.inspection.ranges import Ranges

__all__ = ["MemoryFile", "memory_files"]

#: linux/memfd.h: MFD_HUGE_SHIFT, above which is the size of the huge pages.
_SIZE_SHIFT = 26


class MemoryFile(NamedTuple):
    """``named`` is a descriptor (O_PATH) until the next one is asked for."""

    named: int
    #: As the kernel calls it.
    name: str
    #: What of it is not mapped to be shared, as (begin, end).
    parts: Sequence[tuple[int, int]]


def memory_files(pid: int, mapped: Iterable[Mapping]) -> Iterator[MemoryFile]:
    """Each once. Raises FileNotFoundError, ProcessLookupError if the process has ended."""
    known: dict[tuple[str, str], Ranges] = {}
    for mapping in mapped:
        if mapping.shared:
            octets = mapping.span.end - mapping.span.start
            ranges = known.setdefault(mapping.file, Ranges())
            ranges.add(mapping.offset, mapping.offset + octets)
    for number in os.listdir(f"/proc/{pid}/fd"):
        # It may be closed by now, or be something else.
        with suppress(FileNotFoundError):
            if not name_of(f"/proc/{pid}/fd/{number}").startswith("/memfd:"):
                continue
            if opened(pid, number).mount not in _kernels_mounts():
                continue
            named = os.open(f"/proc/{pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC)
            try:
                if opened("self", named).mount in _kernels_mounts():
                    seen = os.fstat(named)
                    device = f"{os.major(seen.st_dev):02x}:{os.minor(seen.st_dev):02x}"
                    ranges = known.setdefault((device, str(seen.st_ino)), Ranges())
                    parts = ranges.add(0, seen.st_size)
                    yield MemoryFile(named, name_of(f"/proc/self/fd/{named}"), parts)
            finally:
                os.close(named)


@cache
def _kernels_mounts() -> frozenset[int]:
    """One is of files in plain pages, and one of those in each size of huge pages."""
    sizes = (0, os.MFD_HUGETLB, *(os.MFD_HUGETLB | bits << _SIZE_SHIFT for bits in _huge_sizes()))
    found = set()
    for flags in sizes:
        # There need not be huge pages.
        with suppress(OSError):
            own = os.memfd_create("own", os.MFD_CLOEXEC | flags)
            try:
                found.add(opened("self", own).mount)
            finally:
                os.close(own)
    return frozenset(found)


def _huge_sizes() -> list[int]:
    """Each as a power of two."""
    with suppress(FileNotFoundError):
        names = os.listdir("/sys/kernel/mm/hugepages")
        return [
            (int(name.removeprefix("hugepages-")[:-2]) << 10).bit_length() - 1 for name in names
        ]
    return []
