"""Files that are there whole or not at all, whenever the machine or the command is stopped.

Run by ``titus-py rekey`` and ``titus-py keys new``, as root. What a file holds is copied by the
kernel: a private key never comes into this process's memory. Each function raises OSError.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["copy", "forget", "link", "new_file", "opened", "point", "sync"]

_COPIED_AT_ONCE = 1 << 20


@contextmanager
def new_file(path: Path, mode: int, like: os.stat_result, replaces: bool = False) -> Iterator[int]:
    """A file to write, which appears at ``path`` when the block ends well.

    Its owner and group are those of ``like``. It overwrites nothing unless it ``replaces`` what is
    there: where something is there already, FileExistsError. Until then the file is ``.NAME.tmp``;
    one that an interrupted run has left is removed, so only one process at a time may make files
    here.
    """
    temporary = _temporary(path)
    descriptor = _create(temporary, mode, like)
    try:
        yield descriptor
        os.fsync(descriptor)
        if replaces:
            temporary.replace(path)
        else:
            os.link(temporary, path)
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """A regular file to read, and its status. What a symbolic link leads to is not opened."""
    # Without O_NONBLOCK, opening a pipe would wait for somebody who writes.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_regular(path) from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _not_regular(path)
        yield descriptor, status
    finally:
        os.close(descriptor)


def copy(sources: Sequence[int], path: Path, like: os.stat_result) -> None:
    """Have what is in ``sources``, one after the other, at ``path``, in place of what is there.

    ``sources`` are descriptors. The mode, owner and group of ``like`` are the copy's.
    """
    temporary = _temporary(path)
    descriptor = _create(temporary, stat.S_IMODE(like.st_mode), like)
    try:
        for number, source in enumerate(sources):
            if number:
                # Each PEM block wants lines of its own, and the last line may lack its end.
                os.write(descriptor, b"\n")
            offset = 0
            while sent := os.sendfile(descriptor, source, offset, _COPIED_AT_ONCE):
                offset += sent
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    sync(path.parent)


def point(path: Path, target: Path) -> None:
    """Have a symbolic link to ``target`` at ``path``, in place of what is there."""
    temporary = _temporary(path)
    forget(path)
    temporary.symlink_to(os.path.relpath(target, path.parent))
    temporary.replace(path)
    sync(path.parent)


def link(path: Path, other: Path) -> None:
    """Another name for the same file; FileExistsError where something has it already."""
    os.link(path, other)
    sync(other.parent)


def forget(path: Path) -> None:
    """Remove what an interrupted run has left of a file that was to appear at ``path``."""
    _temporary(path).unlink(missing_ok=True)


def sync(directory: Path) -> None:
    """Have the directory's names on the disk before anything that comes after."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _not_regular(path: Path) -> OSError:
    return OSError(errno.EINVAL, "not a regular file", str(path))


def _create(path: Path, mode: int, like: os.stat_result) -> int:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        os.fchown(descriptor, like.st_uid, like.st_gid)
        os.fchmod(descriptor, mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
