"""Files that are small enough to hold a key: found, and read.

Run by ``keyd audit``, as root. Others may be able to write where they are: no link is followed, not
even one that takes a directory's place meanwhile, and nothing waited for but a file system. One
that is mounted below is not asked anything: the kernel tells what is mounted where. What cannot be
read is told, but for what is gone.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from keyd.inspection.open_files import opened
from keyd.linux.mounts import Mount, mounts, uncovered

__all__ = ["LARGEST", "TooLarge", "below", "read"]

LARGEST = 256 * 1024

#: openat2(2): no part of a path may be a link. The kernel's number for it is the same everywhere.
_OPENAT2, _HERE, _NO_LINKS, _HOW = 437, -100, 0x04, struct.Struct("=3Q")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

#: To be called with what cannot be read, and why.
Problem = Callable[[str, str], None]


class TooLarge(ValueError):
    """Such a file is not read."""


def below(
    start: str, at: Callable[[str], None], problem: Problem, elsewhere: Callable[[Mount], None]
) -> Iterator[str]:
    """The files below a directory that are mounted with it. ``at`` is told before each directory.

    ``start`` is no link, and none leads to it. ``elsewhere`` is told what else is mounted there, if
    that is a directory, or somebody's program: to ask what is in it might hang.
    """
    found = mounts()
    mounted = {one.number: one for one in found}
    places = {one.path: one for one in uncovered(found)}
    left = [start]
    own = ""
    while left:
        directory = left.pop()
        at(directory)
        try:
            with _opened(directory, os.O_DIRECTORY) as descriptor:
                device = _device(descriptor, mounted)
                if directory == start:
                    own = device
                elif device != own:
                    problem(directory, "it was mounted meanwhile")
                    continue
                # Not by its path twice: it may be another one by then.
                with os.scandir(f"/proc/self/fd/{descriptor}") as entries:
                    for entry in entries:
                        path = os.path.join(directory, entry.name)
                        is_directory = entry.is_dir(follow_symlinks=False)
                        here = places.get(path)
                        if here and here.device != own and (is_directory or here.is_of_a_program):
                            elsewhere(here)
                        elif is_directory:
                            left.append(path)
                        else:
                            yield path
        except OSError as error:
            if directory == start or not isinstance(error, FileNotFoundError):
                problem(directory, error.strerror or "cannot be read")


def read(file: str) -> tuple[os.stat_result, bytes] | None:
    """A file's status and what is in it; None if it is another kind of file, or gone.

    Raises TooLarge, OSError.
    """
    with suppress(FileNotFoundError), _opened(file) as named:
        # Nor here: the file may be a device by then.
        seen = os.fstat(named)
        if stat.S_ISREG(seen.st_mode):
            return seen, _content(f"/proc/self/fd/{named}", seen.st_size)
    return None


@contextmanager
def _opened(path: str, flags: int = 0) -> Iterator[int]:
    """For nothing but to name it (O_PATH). What is a link itself is opened, and not followed."""
    flags |= os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    how, name = _HOW.pack(flags, 0, _NO_LINKS), os.fsencode(path)
    numbers = (ctypes.c_long(_OPENAT2), ctypes.c_long(_HERE))
    descriptor = _libc.syscall(*numbers, name, how, ctypes.c_long(len(how)))
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _content(file: str, octets: int) -> bytes:
    if octets > LARGEST:
        raise TooLarge
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        content = b""
        # A file system may give less at a time, and the file may grow.
        while more := os.read(descriptor, LARGEST + 1 - len(content)):
            content += more
            if len(content) > LARGEST:
                raise TooLarge
        return content
    finally:
        os.close(descriptor)


def _device(descriptor: int, mounted: Mapping[int, Mount]) -> str:
    """That of the mount: parts of one file system may have others by stat(2) (Btrfs)."""
    number = opened("self", descriptor).mount
    return mounted[number].device if number in mounted else ""
