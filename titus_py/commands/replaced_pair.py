"""Replaces a certificate and its key so that at every moment the two files fit each other.

Run by ``titus-py rekey --install``, as root. Two files cannot be renamed in one step. So both
are first made links that lead through one link to copies of the old pair; then that one link is
turned to the new pair, which is one step; then both are made files again. Whenever that is
interrupted, what is at the two places fits: the old pair or the new one. Where both are in one
file, that file is replaced.
"""

import errno
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from titus_py.commands import whole_files

__all__ = ["Place"]

#: Beside the key, while the pair is replaced: ``old/`` and ``new/``, and ``now``, a link to one.
_WORK, _NOW = ".rekey", "now"
#: As many as the kernel follows (path_resolution(7)).
_MAX_LINKS = 40
_CERTIFICATE, _KEY = "certificate", "key"


class Place(NamedTuple):
    """Where a pair is: the files that links lead to, if there are any."""

    certificate: Path
    key: Path

    @classmethod
    def of(cls, certificate: Path, key: Path) -> "Place":
        """The place of a pair that a configuration names like this; raises OSError."""
        return cls(_led_to(certificate), _led_to(key))

    @property
    def in_one_file(self) -> bool:
        return self.certificate == self.key

    @property
    def _work(self) -> Path:
        return self.key.with_name(f".{self.key.name}{_WORK}")

    def replace(self, certificate: Path, key: Path) -> None:
        """Put these files' contents here, with the old files' modes and owners. Raises OSError."""
        self.settle()
        if self.in_one_file:
            sources = [certificate] if certificate == key else [certificate, key]
            _copy(sources, self.key, self.key)
            return
        for name, pair in (("old", self), ("new", Place(certificate, key))):
            directory = self._work / name
            directory.mkdir(parents=True)
            _copy([pair.certificate], directory / _CERTIFICATE, self.certificate)
            _copy([pair.key], directory / _KEY, self.key)
        now = self._work / _NOW
        whole_files.point(now, self._work / "old")
        whole_files.sync(self._work.parent)
        whole_files.point(self.certificate, now / _CERTIFICATE)
        whole_files.point(self.key, now / _KEY)
        whole_files.point(now, self._work / "new")
        self.settle()

    def settle(self) -> None:
        """Finish what was interrupted: have files here again. Raises OSError."""
        for path in self:
            whole_files.forget(path)
        if not self._work.is_dir():
            return
        for path, name in ((self.certificate, _CERTIFICATE), (self.key, _KEY)):
            if path.is_symlink():
                copied = self._work / _NOW / name
                _copy([copied], path, copied)
        shutil.rmtree(self._work)


def _copy(sources: Sequence[Path], to: Path, like: Path) -> None:
    """With the mode and owner of ``like``. Each has to be a file itself: no link is followed."""
    with ExitStack() as files:
        _, status = files.enter_context(whole_files.opened(like))
        descriptors = [files.enter_context(whole_files.opened(path))[0] for path in sources]
        whole_files.copy(descriptors, to, status)


def _led_to(path: Path) -> Path:
    """The file that a path leads to, but for the links that replacing a pair makes."""
    path = Path(os.path.realpath(path.parent), path.name)
    for _ in range(_MAX_LINKS):
        if not path.is_symlink():
            return path
        target = Path(os.readlink(path))
        if target.parent.name == _NOW and target.parent.parent.name.endswith(_WORK):
            return path
        target = path.parent / target
        path = Path(os.path.realpath(target.parent), target.name)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
