"""Files in memory that a process has open, and need not have mapped (memfd_create(2)).

Run by what looks for keys in memory, as root. What is in them is in no process's memory. It trusts
the kernel: such a file is known by the mount that it is on, the kernel's own, where nobody can make
others. What is elsewhere is not touched: it may hang, or do something.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from keyd.inspection.mappings import Mapping
from keyd.inspection.ranges import Ranges

__all__ = ["MemoryFile", "memory_files"]


class MemoryFile(NamedTuple):
    """``named`` is a descriptor (O_PATH) until the next one is asked for."""

    named: int
    #: As the kernel calls it.
    name: str
    #: What of it is not mapped, as (begin, end).
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
            if not os.readlink(f"/proc/{pid}/fd/{number}").startswith("/memfd:"):
                continue
            if _mount(pid, number) != _kernels_mount():
                continue
            named = os.open(f"/proc/{pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC)
            try:
                if _mount("self", named) == _kernels_mount():
                    seen = os.fstat(named)
                    device = f"{os.major(seen.st_dev):02x}:{os.minor(seen.st_dev):02x}"
                    ranges = known.setdefault((device, str(seen.st_ino)), Ranges())
                    parts = ranges.add(0, seen.st_size)
                    yield MemoryFile(named, os.readlink(f"/proc/self/fd/{named}"), parts)
            finally:
                os.close(named)


def _mount(pid: int | str, descriptor: int | str) -> bytes:
    """Of a descriptor's file (proc(5)): its name may be any, and to look at the file may hang."""
    lines = Path(f"/proc/{pid}/fdinfo/{descriptor}").read_bytes().split(b"\n")
    return next(line for line in lines if line.startswith(b"mnt_id:"))


@cache
def _kernels_mount() -> bytes:
    own = os.memfd_create("own", os.MFD_CLOEXEC)
    try:
        return _mount("self", own)
    finally:
        os.close(own)
