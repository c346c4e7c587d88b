"""Keys in tokens: what goes with them in a configuration, and what keyd is told about them.

Run by the supervisor and by the commands. None of them talks to a token: keyd and ``keyd check``
start the processes that do.
"""

import os
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Protocol

from keyd.linux import seccomp
from keyd.system_calls import NOT_FOR_MODULES, unknown_to_modules
from keyd.token.uri import SCHEME
from titus_py.configuration.mistake import Mistake, Source
from titus_py.configuration.tables import Keyd

__all__ = ["settings", "token_mistakes", "told"]


def token_mistakes(
    place: str, table: dict[str, Any], keyd: Keyd | None, source: Source
) -> Iterator[Mistake]:
    """Of a table that names a certificate and its key."""
    if not str(table.get("key", "")).startswith(SCHEME):
        return
    if table.get("passphrase_file") is not None:
        yield source.mistake(
            f"{place}.passphrase_file",
            "does not go with a key in a token: its PIN's file is named in the URI (pin-source=)",
        )
    if keyd is not None and keyd.token_user is None:
        yield source.mistake(
            "keyd.token_user",
            f"is missing: {place}.key is in a token, whose module needs a user to run as",
        )


class _Key(Protocol):
    @property
    def token(self) -> str | None: ...


class _Facts(Protocol):
    @property
    def reference(self) -> str: ...


def told(keyd: Keyd, found: Iterable[tuple[_Key, _Facts]]) -> dict[str, Any] | None:
    """What keyd is told of keys in tokens, for ``keyd.token.starting``; None: there are none."""
    keys = list(dict.fromkeys((key.token, facts.reference) for key, facts in found if key.token))
    return {"keys": keys, "settings": settings(keyd)} if keys else None


def settings(keyd: Keyd) -> dict[str, Any] | None:
    """How tokens are used; None where none can be."""
    user = keyd.token_user
    if user is None:
        return None
    return {
        "user": (user.uid, user.gid, os.getgrouplist(user.name, user.gid)),
        "paths": list(map(str, keyd.token_paths)),
        "environment": dict(variable.partition("=")[::2] for variable in keyd.token_environment),
        "network": keyd.token_network,
        "filter": _filter(keyd.token_network),
    }


@cache
def _filter(network: bool) -> str:
    return seccomp.build_forbidding(NOT_FOR_MODULES, unknown_to_modules(network)).hex()
