"""Files that may be replaced while we run: certificates, by whatever renews them.

Run by the supervisor, which looks at what stat(2) tells and opens none of them. It
asks now and again instead of being told (inotify(7)): a link to a link to a file, as
renewal tools lay them out, changes in more places than can be watched.
"""

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["FileWatch"]

_State = tuple[tuple[int, int, int, int] | None, ...]


class FileWatch:
    """Tells, of a set of files, that they have changed and then stayed as they are."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = tuple(dict.fromkeys(files))
        self._known = self._last = self._look()

    def settled_change(self) -> bool:
        """Whether they differ from before, and no longer from when this was last called.

        Once for each change: somebody who writes two files, or one slowly, is waited for.
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
