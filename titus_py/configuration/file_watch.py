"""Watches files that may be replaced while we run, such as renewed certificates.

Run by the supervisor, which only calls stat(2) and opens none of the files. It polls instead of
using inotify(7): renewal tools make a link to a link to a file, which changes in more places
than can be watched.
"""

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["FileWatch"]

_State = tuple[tuple[int, int, int, int] | None, ...]


class FileWatch:
    """Tells when a set of files has changed and then stayed the same."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = tuple(dict.fromkeys(files))
        self._known = self._last = self._look()

    def settled_change(self) -> bool:
        """Whether the files have changed, but not since the last call. True once for each change.

        So a program that writes two files, or one slowly, is given time to finish.
        """
        state, last = self._look(), self._last
        self._last = state
        if state == self._known or state != last:
            return False
        self._known = state
        return True

    def _look(self) -> _State:
        return tuple(_stat(file) for file in self._files)


def _stat(file: Path) -> tuple[int, int, int, int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
