"""Files that are small enough to hold a key: found, and read.

Run by ``keyd audit``, as root. Others may be able to write where they are: no link is followed, and
nothing waited for but a file system. One that is mounted below is not asked anything: the kernel
tells what is mounted where. What cannot be read is told, but for what is gone.
"""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["LARGEST", "Mount", "TooLarge", "below", "mounts", "read"]

LARGEST = 256 * 1024

#: To be called with what cannot be read, and why.
Problem = Callable[[str, str], None]


class Mount(NamedTuple):
    """What is mounted, as the kernel has it: ``device`` may be mounted at several places."""

    path: str
    device: str
    kind: str
    options: str

    @property
    def is_of_a_program(self) -> bool:
        """Whether a program answers for it (FUSE): it may be any user's."""
        return self.kind.split(".")[0] in ("fuse", "fuseblk")

    @property
    def is_of_a_user(self) -> bool:
        return self.is_of_a_program and "user_id=0" not in self.options.split(",")


class TooLarge(ValueError):
    """Such a file is not read."""


def below(
    start: str, at: Callable[[str], None], problem: Problem, elsewhere: Callable[[Mount], None]
) -> Iterator[str]:
    """The files below a directory that are mounted with it. ``at`` is told before each directory.

    ``start`` is no link, and none leads to it. ``elsewhere`` is told what else is mounted there, if
    that is a directory, or somebody's program: to ask what is in it might hang.
    """
    mounted = mounts()
    places = {one.path: one for one in mounted.values()}
    left = [start]
    own = ""
    while left:
        directory = left.pop()
        at(directory)
        try:
            opened = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                device = _device(opened, mounted)
            finally:
                os.close(opened)
            if directory == start:
                own = device
            elif device != own:
                problem(directory, "it was mounted meanwhile")
                continue
            with os.scandir(directory) as entries:
                for entry in entries:
                    is_directory = entry.is_dir(follow_symlinks=False)
                    other = places.get(entry.path)
                    if other and other.device != own and (is_directory or other.is_of_a_program):
                        elsewhere(other)
                    elif is_directory:
                        left.append(entry.path)
                    else:
                        yield entry.path
        except OSError as error:
            if directory == start or not isinstance(error, FileNotFoundError):
                problem(directory, error.strerror or "cannot be read")


def read(file: str) -> tuple[os.stat_result, bytes] | None:
    """A file's status and what is in it; None if it is another kind of file, or gone.

    Raises TooLarge, OSError.
    """
    with suppress(FileNotFoundError):
        # Not by its path twice: a directory may be a link by then, and the file a device.
        named = os.open(file, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            seen = os.fstat(named)
            if stat.S_ISREG(seen.st_mode):
                return seen, _content(f"/proc/self/fd/{named}", seen.st_size)
        finally:
            os.close(named)
    return None


def mounts() -> dict[int, Mount]:
    """By their numbers (/proc/PID/mountinfo; proc(5)). In one place, the last is seen.

    Any user names a place, a source and a kind (fusermount3(1)): the kernel escapes what parts
    fields and lines, and no other octet.
    """
    found = {}
    for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n")[:-1]:
        fields = line.split(b" ")
        # After some that are optional.
        kind, _, options = fields[fields.index(b"-") + 1 :][:3]
        words = (_unescaped(fields[4]), fields[2], kind, options)
        found[int(fields[0])] = Mount(*map(os.fsdecode, words))
    return found


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


def _unescaped(name: bytes) -> bytes:
    for octet in b" \t\n\\":
        name = name.replace(b"\\%03o" % octet, bytes([octet]))
    return name


def _device(opened: int, mounted: Mapping[int, Mount]) -> str:
    """That of the mount: parts of one file system may have others by stat(2) (Btrfs)."""
    lines = Path(f"/proc/self/fdinfo/{opened}").read_bytes().split(b"\n")
    number = next(int(line.split()[1]) for line in lines if line.startswith(b"mnt_id:"))
    return mounted[number].device if number in mounted else ""
