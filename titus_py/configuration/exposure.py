"""Who else can read or write a file, or put another in its place (as OpenSSH's StrictModes).

Run by the supervisor, as root, and by ``titus-py check``. What is found is a warning: the
administrator may have reasons.
"""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from titus_py.configuration.across_tables import setting
from titus_py.configuration.address import UnixAddress
from titus_py.configuration.client_table import ClientFiles
from titus_py.configuration.mistake import Mistake, Source
from titus_py.configuration.tables import Credential, LentKey

__all__ = ["exposed_files", "exposed_sockets", "open_directories"]

_GROUP_OR_OTHERS_WRITE = 0o022
_GROUP_OR_OTHERS_READ_OR_WRITE = 0o066
#: More than that the kernel does not follow.
_MOST_LINKS = 40


def exposed_files(
    credentials: Mapping[Credential, list[str]],
    lent: Mapping[LentKey, list[str]],
    of_clients: Mapping[ClientFiles, list[str]],
    included: Iterable[str],
    source: Source,
) -> Iterator[Mistake]:
    """Warnings for keys, passphrases, whose clients are let in, and the configuration's files.

    One for each file that is exposed, and one for each directory that exposes what is below it.
    """
    warned: set[Path] = set()
    secret = _GROUP_OR_OTHERS_READ_OR_WRITE, "read or write it", "chmod 600"
    public = _GROUP_OR_OTHERS_WRITE, "write it", "chmod go-w"
    for credential, (place, *_) in credentials.items():
        for one in credential.secrets:
            field = "passphrase_file" if one == credential.passphrase_file else "key"
            for reason in _exposed(one, *secret, warned):
                yield source.mistake(setting(place, field), reason)
    for key, (place, *_) in lent.items():
        for one in key.secrets:
            for reason in _exposed(one, *secret, warned):
                yield source.mistake(place, reason)
    for files, (place, *_) in of_clients.items():
        for field, path in (("client_ca", files.ca), ("client_crl", files.crl)):
            if path is not None:
                for reason in _exposed(path, *public, warned):
                    yield source.mistake(f"{place}.{files.setting(field)}", reason)
    for file in filter(None, (source.path, *included)):
        for reason in _exposed(Path(file), *public, warned):
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


def exposed_sockets(sockets: Mapping[str, UnixAddress], source: Source) -> Iterator[Mistake]:
    """Warnings for unix sockets in whose place somebody could listen; by the settings' keys."""
    warned: set[Path] = set()
    for key, address in sockets.items():
        for reason in open_directories(Path(address.path), warned):
            yield source.mistake(key, reason)


def open_directories(path: Path, passed: set[Path]) -> Iterator[str]:
    """A reason for each directory on the way to this file in which others can replace it.

    A directory above a link is on the way, and so are those that it leads through. Those in
    ``passed`` were looked at before; those that are looked at now are added.
    """
    for directory, entry in _way(path):
        with suppress(OSError):
            status = directory.stat()
            mode = stat.S_IMODE(status.st_mode)
            # In a sticky directory, nobody can replace the file of another (``/tmp``).
            sticky = mode & stat.S_ISVTX and not _is_strangers_link(entry)
            loose = mode & _GROUP_OR_OTHERS_WRITE and not sticky
            if directory not in passed and (loose or _is_strangers(status.st_uid)):
                yield (
                    f"{path}: others than root can put another file in its place, in {directory} "
                    f"(uid {status.st_uid}'s, mode {mode:04o}): chown root, chmod go-w"
                )
        passed.add(directory)


def _way(path: Path) -> Iterator[tuple[Path, Path]]:
    """The directories that the kernel passes on the way to a file, and what it takes from each.

    See path_resolution(7).
    """
    directory, rest, links = Path("/"), [*reversed(path.absolute().parts[1:])], 0
    while rest:
        name = rest.pop()
        entry = directory / name
        if name == "..":
            directory = directory.parent
            continue
        yield directory, entry
        try:
            target = Path(os.readlink(entry))
        except OSError:  # It is no link.
            directory = entry
            continue
        links += 1
        if links > _MOST_LINKS:
            return
        if target.is_absolute():
            directory = Path("/")
        rest += [part for part in reversed(target.parts) if part != "/"]


def _is_strangers_link(entry: Path) -> bool:
    try:
        found = entry.lstat()
    except OSError:
        return False
    return stat.S_ISLNK(found.st_mode) and _is_strangers(found.st_uid)


def _is_strangers(uid: int) -> bool:
    return uid not in (0, os.geteuid())
