"""Keys that other hosts have: what goes with them in a configuration, and what keyd is told.

Run by the supervisor and by the commands. None of them asks another host: only keyd does, once it
serves.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from keyd.linux import seccomp
from keyd.system_calls import CONNECTING
from titus_py.configuration.mistake import Mistake, Source
from titus_py.configuration.paths import UPSTREAM
from titus_py.configuration.socket_access import SocketAccess
from titus_py.configuration.tables import Configuration, Keyd
from titus_py.configuration.values import User

__all__ = [
    "told",
    "unasked_upstreams",
    "unproved_keys",
    "unreachable_upstreams",
    "upstream_mistakes",
]


def upstream_mistakes(
    place: str, table: dict[str, Any], keyd: Keyd | None, source: Source
) -> Iterator[Mistake]:
    """Of a table that names a certificate and its key."""
    if table.get("key") != UPSTREAM:
        return
    if place.startswith("tunnel"):
        yield source.mistake(
            f"{place}.key",
            "other hosts sign as servers alone: a tunnel's key is in a file, or in a token",
        )
        return
    if table.get("passphrase_file") is not None:
        yield source.mistake(
            f"{place}.passphrase_file", "does not go with a key that other hosts have"
        )
    if keyd is not None and keyd.upstream is None:
        yield source.mistake(
            "keyd.upstream",
            f"is missing: {source.reference(f'{place}.key')} is another host's, and this says how "
            "that host is asked",
        )
    if keyd is not None and keyd.upstream_user is None:
        yield source.mistake(
            "keyd.upstream_user",
            f"is missing: {source.reference(f'{place}.key')} is another host's, and the way there "
            "is connected to by a process with a user of its own",
        )


def unasked_upstreams(configuration: Configuration, source: Source) -> Iterator[Mistake]:
    """A warning of upstreams that no virtual host has a use for."""
    keyd = configuration.keyd
    if keyd.upstream is not None and not _with_upstream(configuration):
        yield source.mistake("keyd.upstream", f'has no effect: no [[vhost]] has key = "{UPSTREAM}"')


def unreachable_upstreams(configuration: Configuration, source: Source) -> Iterator[Mistake]:
    """Warnings of sockets that are not there, or of tunnels' that keep out who is to connect."""
    keyd, user = configuration.keyd, configuration.keyd.upstream_user
    tunnels = {tunnel.listen: number for number, tunnel in enumerate(configuration.tunnel)}
    for upstream in keyd.upstream or ():
        number = tunnels.get(upstream)
        if number is None and not os.path.lexists(upstream.path):
            yield source.mistake(
                "keyd.upstream",
                f"{upstream}: no [[tunnel]] listens there, and nothing is there now",
            )
        elif number is not None and user is not None:
            access = SocketAccess.of(configuration.tunnel[number])
            if not _lets_in(access, user):
                yield source.mistake(
                    f"tunnel[{number}].socket_group",
                    f"its socket does not let keyd.upstream_user connect, which is {user.name}: "
                    f"set socket_group to a group of that user's",
                )


def _lets_in(access: SocketAccess, user: User) -> bool:
    """Whether this user may connect to a unix socket (unix(7): it takes the right to write)."""
    uid, gid = access.owner
    if user.uid == uid:
        return bool(access.mode & stat.S_IWUSR)
    if gid in os.getgrouplist(user.name, user.gid):
        return bool(access.mode & stat.S_IWGRP)
    return bool(access.mode & stat.S_IWOTH)


def unproved_keys(configuration: Configuration) -> Iterator[str]:
    """What ``titus-py check`` cannot know: it asks no other host."""
    if number := _with_upstream(configuration):
        what = "one certificate" if number == 1 else f"{number} certificates"
        yield (
            f"# Not checked: whether another host has the key of {what} "
            f'(key = "{UPSTREAM}"). titus-py status shows it.'
        )


def told(keyd: Keyd, references: Iterable[str]) -> dict[str, Any] | None:
    """What keyd is told, for ``keyd.upstream.starting``; None where no key is another host's."""
    keys = list(dict.fromkeys(references))
    user = keyd.upstream_user
    if not keys or keyd.upstream is None or user is None:
        return None
    return {
        "references": keys,
        "paths": [one.path for one in keyd.upstream],
        "user": (user.uid, user.gid, os.getgrouplist(user.name, user.gid)),
        "filter": _filter(),
    }


@cache
def _filter() -> str:
    return seccomp.build(CONNECTING).hex()


def _with_upstream(configuration: Configuration) -> int:
    return sum(one.upstream for vhost in configuration.vhost for one in vhost.credentials.values())
