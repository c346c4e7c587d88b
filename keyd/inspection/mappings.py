"""A process's mappings, as the kernel lists them (/proc/PID/maps; proc(5)).

Run by what looks for keys in memory, as root. It trusts the kernel; a file's name may be anything.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from sys import intern
from typing import NamedTuple

__all__ = ["Mapping", "Skipped", "Span", "mappings", "still_mapped"]


class Span(NamedTuple):
    start: int
    end: int
    mapping: str


class Skipped(NamedTuple):
    """Memory that could not be read, and the kernel's reason."""

    mapping: str
    address: int
    octets: int
    reason: str


class Mapping(NamedTuple):
    """A line of /proc/PID/maps; ``offset`` is where it begins in its file.

    ``file`` is the file's device and inode as the kernel knows them, which stat(2) may not tell.
    """

    span: Span
    shared: bool
    executable: bool
    offset: int
    file: tuple[str, str]

    @property
    def device(self) -> str:
        """Of a file; empty if there is none."""
        device, inode = self.file
        return device if inode != "0" else ""

    def skipped(self, reason: str) -> Skipped:
        start, end, name = self.span
        return Skipped(name, start, end - start, reason)


def mappings(pid: int) -> list[Mapping]:
    """In ascending order."""
    found = []
    # All of it as one text might be hundreds of megabytes: any user can have 65,530, with long
    # names. These may have what str.splitlines takes for the end of a line.
    with open(f"/proc/{pid}/maps", "rb") as lines:
        for line in lines:
            addresses, permissions, offset, device, inode, *name = (
                line.removesuffix(b"\n").decode(errors="replace").split(maxsplit=5)
            )
            start, end = (int(address, 16) for address in addresses.split("-"))
            span = Span(start, end, intern(name[0].rstrip()) if name else "[anonymous]")
            shared, executable = permissions[3] == "s", permissions[2] == "x"
            found.append(Mapping(span, shared, executable, int(offset, 16), (device, inode)))
    return found


def still_mapped(parts: Iterable[Skipped], spans: Sequence[Span]) -> list[Skipped]:
    """Those parts that are in these spans, which are in ascending order. There may be many."""
    ends = [span.end for span in spans]

    def is_mapped(part: Skipped) -> bool:
        at = bisect_right(ends, part.address)
        return at < len(spans) and spans[at].start < part.address + part.octets

    return [part for part in parts if is_mapped(part)]
