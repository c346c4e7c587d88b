"""Which parts of a shared mapping have anything, as its file says (/proc/PID/map_files; proc(5)).

Run by what looks for keys in memory, as root. What is in a shared mapping need not be among the
pages that one process has in use. To read all of it would make memory of each page that is not
there yet: of a database's that has room for a terabyte, a terabyte. Of files, the kernel says where
they have data, also if it is swapped out (SEEK_DATA, lseek(2)). Those in huge pages are looked at.
Of those on ramfs it says which pages there are (mincore(2)). It trusts the kernel.
"""

import ctypes
import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from mmap import MAP_SHARED

from keyd.inspection.pages_in_use import PAGE

__all__ = ["filled", "kernels_own", "mapped_file"]

#: The types of file systems, as statfs(2) has them in its first field.
_HUGETLBFS, _RAMFS = 0x958458F6, 0x858458F6
_ZEROS = bytes(2 * 1024 * 1024)
#: So much of a file on ramfs is asked about at once, and what the answer has of each page.
_BLOCK_OCTETS, _THERE = 1 << 28, re.compile(b"\x01+")
_PROT_NONE, _MAP_FAILED = 0, ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p


@contextmanager
def mapped_file(pid: int, start: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """The file that is mapped here, not opened (O_PATH), and its device and inode.

    Raises OSError where that cannot be told: without CAP_CHECKPOINT_RESTORE, or of a device.
    """
    # A device must not be opened: that may do something.
    named = os.open(f"/proc/{pid}/map_files/{start:x}-{end:x}", os.O_PATH | os.O_CLOEXEC)
    try:
        seen = os.fstat(named)
        if not stat.S_ISREG(seen.st_mode):
            raise OSError(errno.ESPIPE, "not a file")
        yield named, (seen.st_dev, seen.st_ino)
    finally:
        os.close(named)


def filled(named: int, wanted: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What of these parts of a file has data, in ascending order as they are. Raises OSError."""
    if not wanted:
        return
    file = os.open(f"/proc/self/fd/{named}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        parts = {_HUGETLBFS: _not_empty, _RAMFS: _there}.get(_type(file), _with_data)
        for first, after in wanted:
            yield from parts(file, first, after)
    finally:
        os.close(file)


@cache
def kernels_own() -> int:
    """The device of files in memory that are nowhere mounted: memfd_create(2), and shared mappings
    without a file. Their inodes are numbered one after the other.
    """
    file = os.memfd_create("own", os.MFD_CLOEXEC)
    try:
        return os.fstat(file).st_dev
    finally:
        os.close(file)


def _with_data(file: int, at: int, end: int) -> Iterator[tuple[int, int]]:
    while at < end:
        try:
            data = os.lseek(file, at, os.SEEK_DATA)
            hole = os.lseek(file, data, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                # There is none up to the file's end.
                return
            raise
        first = data // PAGE * PAGE
        if first >= end:
            return
        after = min(end, -(-hole // PAGE) * PAGE)
        # A file system that is a program of somebody's (FUSE) may say anything.
        if not at <= first < after:
            raise OSError(errno.EIO, "no such part")
        at = after
        yield first, at


def _not_empty(file: int, at: int, end: int) -> Iterator[tuple[int, int]]:
    """Of a file in huge pages, for which the kernel does not say where it has data.

    To read the file makes no page of it, unlike to read the mapping.
    """
    if end - at > os.sysconf("SC_PHYS_PAGES") * PAGE:
        raise OSError(errno.EFBIG, "more than there can be")
    while octets := os.pread(file, min(len(_ZEROS), end - at), at):
        if octets != _ZEROS[: len(octets)]:
            yield at, at + len(octets)
        at += len(octets)


def _there(file: int, at: int, end: int) -> Iterator[tuple[int, int]]:
    """Of a file on ramfs, which has data everywhere, as the kernel says: to read it makes pages.

    Any user can mount one. It is mapped to be asked about, and not to be read.
    """
    while at < end:
        octets = min(_BLOCK_OCTETS, end - at)
        found = ctypes.create_string_buffer(-(-octets // PAGE))
        length, offset = ctypes.c_size_t(octets), ctypes.c_long(at)
        place = ctypes.c_void_p(_libc.mmap(None, length, _PROT_NONE, MAP_SHARED, file, offset))
        if place.value == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), "cannot be mapped")
        try:
            if _libc.mincore(place, length, found):
                raise OSError(ctypes.get_errno(), "does not tell which pages there are")
        finally:
            _libc.munmap(place, length)
        for run in _THERE.finditer(found.raw):
            yield at + run.start() * PAGE, at + run.end() * PAGE
        at += octets


def _type(file: int) -> int:
    """Of its file system: hugetlbfs also of what memfd_create(2), mmap(2) and shmget(2) make."""
    found = (ctypes.c_long * 32)()
    return 0 if _libc.fstatfs(file, found) else found[0]
