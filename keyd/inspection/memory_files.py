"""Files in memory that a process has open, and need not have mapped (memfd_create(2)).

Run by what looks for keys in memory, as root. What is in them is in no process's memory. The same
goes for those that it has mapped privately: what it has not touched of them is in the file alone.
It trusts the kernel: such a file is known by the mount that it is on, the kernel's own, where
nobody can make others. What is elsewhere is not touched: it may hang, or do something.
"""

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from keyd.inspection.mappings import Mapping, Skipped
from keyd.inspection.ranges import Ranges
from keyd.inspection.shared_memory import mapped_file

__all__ = ["MemoryFile", "memory_files"]

#: linux/memfd.h: MFD_HUGE_SHIFT, above which is the size of the huge pages.
_SIZE_SHIFT = 26


class MemoryFile(NamedTuple):
    """``named`` is a descriptor (O_PATH) until the next one is asked for."""

    named: int
    #: As the kernel calls it.
    name: str
    #: What of it is not mapped for everybody, as (begin, end).
    parts: Sequence[tuple[int, int]]


def memory_files(
    pid: int, mapped: Sequence[Mapping], skipped: list[Skipped]
) -> Iterator[MemoryFile]:
    """Each once; ``skipped`` gets what could not be opened.

    Raises FileNotFoundError, ProcessLookupError if the process has ended.
    """
    known: dict[tuple[str, str], Ranges] = {}
    for mapping in mapped:
        if mapping.shared:
            octets = mapping.span.end - mapping.span.start
            ranges = known.setdefault(mapping.file, Ranges())
            ranges.add(mapping.offset, mapping.offset + octets)
    for number in os.listdir(f"/proc/{pid}/fd"):
        # It may be closed by now, or be something else.
        with suppress(FileNotFoundError):
            if not os.readlink(f"/proc/{pid}/fd/{number}").startswith("/memfd:"):
                continue
            if _mount(pid, number) not in _kernels_mounts():
                continue
            named = os.open(f"/proc/{pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC)
            try:
                if _mount("self", named) in _kernels_mounts():
                    yield _file(named, known)
            finally:
                os.close(named)
    yield from _mapped_privately(pid, mapped, known, skipped)


def _mapped_privately(
    pid: int,
    mapped: Iterable[Mapping],
    known: dict[tuple[str, str], Ranges],
    skipped: list[Skipped],
) -> Iterator[MemoryFile]:
    done = set()
    for mapping in mapped:
        if mapping.shared or mapping.device not in _kernels_devices() or mapping.file in done:
            continue
        done.add(mapping.file)
        start, end, _ = mapping.span
        try:
            with mapped_file(pid, start, end) as (named, _):
                if _mount("self", named) in _kernels_mounts():
                    yield _file(named, known)
        except FileNotFoundError:
            # It was unmapped, or the process has ended.
            continue
        except OSError as error:
            reason = f"what is not in use cannot be read: {os.strerror(error.errno or errno.EIO)}"
            skipped.append(mapping.skipped(reason))


def _file(named: int, known: dict[tuple[str, str], Ranges]) -> MemoryFile:
    seen = os.fstat(named)
    ranges = known.setdefault((_device(seen), str(seen.st_ino)), Ranges())
    parts = ranges.add(0, seen.st_size)
    return MemoryFile(named, os.readlink(f"/proc/self/fd/{named}"), parts)


def _device(seen: os.stat_result) -> str:
    """As /proc/PID/maps has it."""
    return f"{os.major(seen.st_dev):02x}:{os.minor(seen.st_dev):02x}"


def _mount(pid: int | str, descriptor: int | str) -> bytes:
    """Of a descriptor's file (proc(5)): its name may be any, and to look at the file may hang."""
    lines = Path(f"/proc/{pid}/fdinfo/{descriptor}").read_bytes().split(b"\n")
    return next(line for line in lines if line.startswith(b"mnt_id:"))


@cache
def _kernels_mounts() -> frozenset[bytes]:
    """One is of files in plain pages, and one of those in each size of huge pages."""
    return frozenset(mount for mount, _ in _kernels_own())


@cache
def _kernels_devices() -> frozenset[str]:
    return frozenset(device for _, device in _kernels_own())


@cache
def _kernels_own() -> frozenset[tuple[bytes, str]]:
    sizes = (0, os.MFD_HUGETLB, *(os.MFD_HUGETLB | bits << _SIZE_SHIFT for bits in _huge_sizes()))
    found = set()
    for flags in sizes:
        # There need not be huge pages.
        with suppress(OSError):
            own = os.memfd_create("own", os.MFD_CLOEXEC | flags)
            try:
                found.add((_mount("self", own), _device(os.fstat(own))))
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
