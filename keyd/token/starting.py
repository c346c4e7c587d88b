"""Starting the processes of tokens, one for each token.

Run by keyd before it reads a key and before it gives anything up, and by ``keyd check``
(``keyd.helper``).
"""

import os
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from keyd import helper
from keyd.accounts import user_of
from keyd.reference import public_key_of
from keyd.token.keys import PublicKey, Token, TokenKey, rehearse_verifying
from keyd.token.uri import KeyUri, check_module, parse

__all__ = ["Settings", "User", "start", "start_told", "user_named"]


def _ignore(_: object) -> None:
    """Of no interest here."""


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
    #: The modules' system call filter, as BPF in hexadecimal.
    filter: str = ""
    #: Whether a module's standard error is the caller's. Of an instance, that is the log, in which
    #: a module that was taken over could write lines that pass for another process's.
    may_speak: bool = False

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "Settings":
        uid, gid, groups = told["user"]
        # Whoever is not root cannot become anybody.
        user = User(uid, gid, tuple(groups)) if os.geteuid() == 0 else None
        paths = tuple(told["paths"])
        return cls(user, paths, told["environment"], told["network"], told["filter"])


def user_named(name: str) -> User:
    """Raises LookupError."""
    entry = user_of(name)
    groups = os.getgrouplist(name, entry.pw_gid)
    return User(entry.pw_uid, entry.pw_gid, tuple(groups))


def start_told(told: dict[str, Any]) -> list[Token]:
    """Start those that titus-py tells of: ``keys``, each a URI and a reference, and ``settings``.

    What they say is for ``States`` alone. Raises OSError, BadUri.
    """
    keys = [(parse(uri), public_key_of(reference)) for uri, reference in told["keys"]]
    rehearse_verifying()
    return start(keys, Settings.from_json(told["settings"]))


def start(
    keys: Iterable[tuple[KeyUri, PublicKey | None]],
    settings: Settings,
    say: Callable[[str], None] = _ignore,
    found: Callable[[TokenKey], None] = _ignore,
) -> list[Token]:
    """Start a process for each token of these keys. Raises OSError, BadUri.

    With each key comes its public part, if a certificate tells it.
    """
    places: dict[tuple[str | None, ...], list[tuple[KeyUri, PublicKey | None]]] = {}
    for uri, public in keys:
        check_module(uri.module_path)
        places.setdefault(uri.place, []).append((uri, public))
    tokens = []
    for those in places.values():
        uris = [uri for uri, _ in those]
        names = [uri.key_name for uri in uris]
        process = _start(uris, settings)
        publics = [public for _, public in those]
        tokens.append(Token(uris[0].token_name, process, names, publics, say, found))
    return tokens


def _start(uris: list[KeyUri], settings: Settings) -> socket.socket:
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
        "filter": settings.filter,
    }
    return helper.start("token", told, settings.environment, may_speak=settings.may_speak)
