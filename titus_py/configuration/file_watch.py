"""Watches files that may be replaced while we run, such as renewed certificates.

Run by the supervisor, which only calls stat(2) and opens none of the files. It polls instead of
using inotify(7): renewal tools make a link to a link to a file, which changes in more places
than can be watched.
"""

import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from titus_py.configuration.certificate_dir import pairs
from titus_py.configuration.tables import Credential

__all__ = ["FileWatch"]

_State = tuple[tuple[Path, tuple[int, int, int, int] | None], ...]
#: Of more files, so many are looked at for each call on the average.
_FILES_AT_ONCE = 1000


class FileWatch:
    """Tells when a set of files has changed and then stayed the same.

    So it does for the pairs of these directories (``certificate_dir``), those to come included.
    """

    def __init__(self, files: Iterable[Path], directories: Iterable[Path] = ()) -> None:
        self._files = tuple(dict.fromkeys(files))
        self._directories = tuple(dict.fromkeys(directories))
        self._known = self._last = self._look()
        #: How many calls to leave out: thousands of files are looked at less often.
        self._rest = 0

    @classmethod
    def of(cls, credentials: Collection[Credential], others: Iterable[Path] = ()) -> "FileWatch":
        """For other files, those of credentials, and the directories that these were found in."""
        named = [one for one in credentials if one.directory is None]
        files = list(others)
        files += [one.certificate for one in named]
        files += [file for one in named for file in one.secrets]
        return cls(files, [one.directory for one in credentials if one.directory is not None])

    def settled_change(self) -> bool:
        """Whether the files have changed, but not since the last call. True once for each change.

        So a program that writes two files, or one slowly, is given time to finish.
        """
        if self._rest:
            self._rest -= 1
            return False
        state, last = self._look(), self._last
        self._last = state
        self._rest = len(state) // _FILES_AT_ONCE if state == last else 0
        if state == self._known or state != last:
            return False
        self._known = state
        return True

    def _look(self) -> _State:
        found = [(file, _stat(file)) for file in self._files]
        for directory in self._directories:
            with suppress(OSError):
                for pair in pairs(directory):
                    found += [(file, _stat(file)) for file in (pair.certificate, pair.key)]
        return tuple(found)


def _stat(file: Path) -> tuple[int, int, int, int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
