"""Who else can read a secret file, or put another in its place (as OpenSSH's StrictModes).

Run by the supervisor, as root, and by ``titus-py check``. What is found is a warning: the
administrator may have reasons.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from titus_py.configuration.across_tables import setting
from titus_py.configuration.mistake import Mistake, Source
from titus_py.configuration.tables import Credential

__all__ = ["exposed_files", "open_directories"]

_GROUP_OR_OTHERS_WRITE = 0o022
_GROUP_OR_OTHERS_READ_OR_WRITE = 0o066


def exposed_files(credentials: Mapping[Credential, list[str]], source: Source) -> Iterator[Mistake]:
    """Warnings for files of keys and passphrases, and for the configuration file.

    One for each file that is exposed, and one for each directory that exposes what is below it.
    """
    warned: set[Path] = set()
    for credential, (place, *_) in credentials.items():
        for field in ("key", "passphrase_file"):
            path = getattr(credential, field)
            if path is not None:
                secret = _GROUP_OR_OTHERS_READ_OR_WRITE, "read or write it", "chmod 600"
                for reason in _exposed(path, *secret, warned):
                    yield source.mistake(setting(place, field), reason)
    if source.path:
        settings = _GROUP_OR_OTHERS_WRITE, "write it", "chmod go-w"
        for reason in _exposed(Path(source.path), *settings, warned):
            yield source.mistake("", reason)


def _exposed(
    path: Path, forbidden: int, verb: str, advice: str, warned: set[Path]
) -> Iterator[str]:
    """What is wrong with this file, or with a directory above it, unless it was said before."""
    if path in warned:
        return
    warned.add(path)
    try:
        found = path.stat()
    except OSError:  # The file has gone since it was found. Opening it will say so.
        return
    mode = stat.S_IMODE(found.st_mode)
    if mode & forbidden:
        yield f"{path}: others than its owner can {verb} (mode {mode:04o}): {advice}"
    elif _is_strangers(found.st_uid):
        yield f"{path}: uid {found.st_uid} owns it, and can {verb}: chown root"
    yield from open_directories(path, warned)


def open_directories(path: Path, passed: set[Path]) -> Iterator[str]:
    """A reason for each directory above this file in which others than root can replace it.

    Directories in ``passed`` were looked at before; those that are looked at now are added.
    """
    try:
        above = path.resolve().parents
    except OSError:
        return
    for directory in above:
        # What is above a directory that was looked at has been looked at, too.
        if directory in passed:
            return
        passed.add(directory)
        with suppress(OSError):
            status = directory.stat()
            mode = stat.S_IMODE(status.st_mode)
            # In a sticky directory, nobody can replace the file of another (``/tmp``).
            loose = mode & _GROUP_OR_OTHERS_WRITE and not mode & stat.S_ISVTX
            if loose or _is_strangers(status.st_uid):
                yield (
                    f"{path}: others than root can put another file in its place, in {directory} "
                    f"(uid {status.st_uid}'s, mode {mode:04o}): chown root, chmod go-w"
                )


def _is_strangers(uid: int) -> bool:
    return uid not in (0, os.geteuid())
