"""What of this process's memory is a file's, as it was mapped. Run by the fork server."""

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Mapped", "unchanged"]


class Mapped(NamedTuple):
    """A file that is mapped there; ``permissions`` are as in proc_pid_maps(5)."""

    place: range
    permissions: str
    file: str


def unchanged() -> Iterator[Mapped]:
    """What nobody has written to since it was mapped, by address (proc_pid_smaps(5))."""
    mapped = None
    with open("/proc/self/smaps", encoding="ascii", errors="replace") as file:
        for line in file:
            name, *rest = line.split()
            if not name.endswith(":"):
                start, end = (int(address, 16) for address in name.split("-"))
                is_file = rest[-1].startswith("/")
                mapped = Mapped(range(start, end), rest[0], rest[-1]) if is_file else None
            elif mapped is not None and name == "Anonymous:" and rest[0] == "0":
                yield mapped
