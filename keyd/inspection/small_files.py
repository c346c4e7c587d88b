"""Files that are small enough to hold a key: found, and read.

Run by ``keyd audit``, as root. Others may be able to write where they are: no link is followed, and
nothing waited for but a file system. One that is mounted below is not asked anything: the kernel
tells what is mounted where.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["LARGEST", "below", "read"]

LARGEST = 256 * 1024


def below(start: str, at: Callable[[str], None]) -> Iterator[str]:
    """The files on the file system of this directory. ``at`` is told before each directory."""
    mounts = _mounts()
    at(start)
    device, mounted = _device(start), _mounted(start, mounts)
    left = [start]
    while left:
        directory = left.pop()
        at(directory)
        with suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    yield entry.path
                elif mounts.get(entry.path, mounted) == mounted and _device(entry.path) == device:
                    left.append(entry.path)


def read(file: str) -> tuple[os.stat_result, bytes] | None:
    """A file's status and what is in it; None if it is another kind of file, or too large."""
    with suppress(OSError):
        # Not by its path twice: a directory may be a link by then, and the file a device.
        named = os.open(file, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            seen = os.fstat(named)
            if stat.S_ISREG(seen.st_mode) and seen.st_size <= LARGEST:
                return seen, _content(f"/proc/self/fd/{named}")
        finally:
            os.close(named)
    return None


def _content(file: str) -> bytes:
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(descriptor, LARGEST)
    finally:
        os.close(descriptor)


def _mounts() -> dict[str, str]:
    """Where file systems are mounted, and their devices (/proc/PID/mountinfo; proc(5))."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    fields = [line.split(b" ") for line in lines]
    return {os.fsdecode(_unescaped(one[4])): one[2].decode() for one in fields}


def _unescaped(name: bytes) -> bytes:
    for octet in b" \t\n\\":
        name = name.replace(b"\\%03o" % octet, bytes([octet]))
    return name


def _mounted(path: str, mounts: dict[str, str]) -> str:
    """The device that is mounted where this is."""
    place = Path(path).absolute()
    return next((mounts[str(one)] for one in (place, *place.parents) if str(one) in mounts), "")


def _device(path: str) -> int | None:
    try:
        return os.lstat(path).st_dev
    except OSError:
        return None
