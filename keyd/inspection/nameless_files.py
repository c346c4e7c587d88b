"""Files that a process has open and that are in no directory: in memory, or removed.

Run by what looks for keys in memory, as root. What is in them is in no process's memory, and no
search of directories finds it (memfd_create(2), unlink(2)). It trusts the kernel: what a file is on
is known by the number of its mount. Only what is in memory or on a disk is touched: anything else
may hang, or do something. On a disk, a file that is too large for a key is left out.
"""

import ctypes
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import NamedTuple

from keyd.inspection.mappings import Mapping
from keyd.inspection.open_files import name_of, opened
from keyd.inspection.ranges import Ranges
from keyd.inspection.small_files import LARGEST
from keyd.linux.mounts import Mount, mounts

__all__ = ["NamelessFile", "nameless_files"]

#: What the kernel adds to the name of a file that is in no directory (proc_pid_fd(5)).
_DELETED = " (deleted)"
#: linux/memfd.h: MFD_HUGE_SHIFT, above which is the size of the huge pages.
_SIZE_SHIFT = 26
#: kcmp(2), and its KCMP_FILES. It takes other numbers than /proc has where that is mounted in
#: another pid namespace.
_KCMP, _FILES = {"x86_64": 312}.get(os.uname().machine, 272), 2
_CAN_COMPARE = os.readlink("/proc/self") == str(os.getpid())
_libc = ctypes.CDLL(None)


class NamelessFile(NamedTuple):
    """``named`` is a descriptor (O_PATH) until the next one is asked for."""

    named: int
    #: As the kernel calls it.
    name: str
    #: What of it is not mapped to be shared, as (begin, end).
    parts: Sequence[tuple[int, int]]


def nameless_files(pid: int, mapped: Iterable[Mapping]) -> Iterator[NamelessFile]:
    """Each once. Raises FileNotFoundError, ProcessLookupError if the process has ended."""
    known: dict[tuple[str, str], Ranges] = {}
    for mapping in mapped:
        if mapping.shared:
            octets = mapping.span.end - mapping.span.start
            ranges = known.setdefault(mapping.file, Ranges())
            ranges.add(mapping.offset, mapping.offset + octets)
    places = _Places(pid)
    for table, number in _descriptors(pid):
        # It may be closed by now, or be something else.
        with suppress(FileNotFoundError, ProcessLookupError):
            link = f"/proc/{table}/fd/{number}"
            # Empty: it is too long, and may end with anything.
            name = name_of(link)
            if name and not name.endswith(_DELETED):
                continue
            if not places.largest(opened(table, number).mount):
                continue
            named = os.open(link, os.O_PATH | os.O_CLOEXEC)
            try:
                largest = places.largest(opened("self", named).mount)
                if largest:
                    seen = os.fstat(named)
                    if stat.S_ISREG(seen.st_mode) and not seen.st_nlink and seen.st_size <= largest:
                        device = f"{os.major(seen.st_dev):02x}:{os.minor(seen.st_dev):02x}"
                        ranges = known.setdefault((device, str(seen.st_ino)), Ranges())
                        parts = ranges.add(0, seen.st_size)
                        yield NamelessFile(named, name or "a path that is too long", parts)
            finally:
                os.close(named)


def _descriptors(pid: int) -> Iterator[tuple[str, str]]:
    """Of all threads: where in /proc, and its number. Any may have its own (unshare(2))."""
    before = 0
    for thread in map(int, os.listdir(f"/proc/{pid}/task")):
        # There may be thousands, which mostly share them.
        if not (before and _share_descriptors(before, thread)):
            table = f"{pid}/task/{thread}"
            with suppress(FileNotFoundError, ProcessLookupError):
                for number in os.listdir(f"/proc/{table}/fd"):
                    yield table, number
        before = thread


def _share_descriptors(thread: int, other: int) -> bool:
    """Not, if that cannot be told: one may have ended."""
    numbers = (_KCMP, thread, other, _FILES, 0, 0)
    return _CAN_COMPARE and _libc.syscall(*map(ctypes.c_long, numbers)) == 0


class _Places:
    """The mounts whose files may be touched, as the process or this one sees them."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._mounts: dict[int, Mount] = {}

    def largest(self, number: int) -> int:
        """Of how many octets a file may be on this mount; 0 if none is to be touched."""
        if number in _kernels_mounts():
            return sys.maxsize
        if not self._mounts:
            self._mounts = {one.number: one for one in (*mounts(self._pid), *mounts())}
        mount = self._mounts.get(number)
        if mount is None or not mount.is_local:
            return 0
        # Only there does the kernel tell what of a file is filled, however large the file is.
        return sys.maxsize if mount.kind == "tmpfs" else LARGEST


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
