"""Starting the processes of tokens, one for each token.

Run by keyd before it reads a key and before it gives anything up, and by ``keyd check``. What is
started has its own memory (execve(2)), and of keyd's descriptors the one end of a socket.
"""

import json
import os
import pwd
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from keyd.linux import seccomp
from keyd.linux.process import signals_held_back
from keyd.linux.sealed import sealed_file
from keyd.system_calls import NOT_FOR_MODULES, UNKNOWN_TO_MODULES
from keyd.token.keys import PublicKey, Token, TokenKey
from keyd.token.uri import BadUri, KeyUri

__all__ = ["Settings", "User", "check_module", "start", "user_named"]


class User(NamedTuple):
    """Whom the processes of tokens run as."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class Settings(NamedTuple):
    """What the processes of all tokens have in common."""

    #: None where keyd was never root: then they run as whoever started keyd.
    user: User | None
    #: What modules may read and write, besides what libraries are and read.
    paths: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}
    network: bool = False


def user_named(name: str) -> User:
    """Raises KeyError."""
    entry = pwd.getpwnam(name)
    groups = os.getgrouplist(name, entry.pw_gid)
    return User(entry.pw_uid, entry.pw_gid, tuple(groups))


def check_module(path: str) -> None:
    """Raises BadUri for a module that somebody other than root could have changed."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise BadUri(f"has module-path={path}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise BadUri(f"has module-path={path}, which is no regular file")
    if found.st_uid != 0 or found.st_mode & 0o022:
        raise BadUri(f"has module-path={path}, which others than root may write to")


def start(
    keys: Iterable[tuple[KeyUri, PublicKey | None]],
    settings: Settings,
    say: Callable[[str], None],
    found: Callable[[TokenKey], None],
) -> list[Token]:
    """Start a process for each token of these keys. Raises OSError, BadUri.

    With each key comes its public part, if a certificate tells it.
    """
    places: dict[tuple[str | None, ...], list[tuple[KeyUri, PublicKey | None]]] = {}
    for uri, public in keys:
        check_module(uri.module_path)
        places.setdefault(uri.place, []).append((uri, public))
    program = seccomp.build_forbidding(NOT_FOR_MODULES, UNKNOWN_TO_MODULES).hex() if places else ""
    tokens = []
    for those in places.values():
        uris = [uri for uri, _ in those]
        names = [uri.key_name for uri in uris]
        process = _start(uris, settings, program)
        publics = [public for _, public in those]
        tokens.append(Token(uris[0].token_name, process, names, publics, say, found))
    return tokens


def _start(uris: list[KeyUri], settings: Settings, program: str) -> socket.socket:
    first = uris[0]
    user = settings.user or User(os.geteuid(), os.getegid())
    told = {
        **dict(zip(("token", "manufacturer", "model", "serial"), first[:4], strict=True)),
        "module": first.module_path,
        "pin_file": first.pin_file,
        "keys": [(uri.object, uri.id and uri.id.hex()) for uri in uris],
        **user._asdict(),
        "paths": settings.paths,
        "network": settings.network,
        "filter": program,
    }
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    descriptor = sealed_file("token-settings", json.dumps(told).encode())
    options = [f"--settings-fd={descriptor}", f"--keyd-fd={theirs.fileno()}"]
    try:
        with theirs, signals_held_back():
            # Not waited for: it ends with keyd. It has a session of its own, so that a terminal's
            # signals are not for it.
            process = subprocess.Popen(
                [sys.executable, "-I", "-m", "keyd", "token", *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=dict(settings.environment),
                pass_fds=(descriptor, theirs.fileno()),
                start_new_session=True,
            )
    finally:
        os.close(descriptor)
    # Nobody waits for it, and Popen is not to say so.
    process.returncode = 0
    return ours
