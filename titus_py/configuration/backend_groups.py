"""[worker] backend_groups: the groups by which the parent reaches backends' unix sockets.

Run by the supervisor and by the commands, as root. Without the setting, the parent has a capability
that reaches every unix socket of the machine.
"""
# ruff: noqa: TRY004 -- pydantic makes a mistake of a ValueError, and lets a TypeError through

import grp
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import PlainSerializer, PlainValidator

from titus_py.configuration.address import UnixAddress
from titus_py.configuration.mistake import Mistake, Source, described

if TYPE_CHECKING:
    from titus_py.configuration.tables import Configuration

__all__ = ["BackendGroups", "Group", "unreachable_sockets"]

_MAX_GID = 0xFFFF_FFFE


class Group(NamedTuple):
    """A group of the system, or a gid that has no name."""

    name: str
    gid: int


def _group(value: object) -> Group:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"expected a group's name or number, not {described(value)}")
    if isinstance(value, int) or re.fullmatch(r"[0-9]{1,10}", value):
        if not 0 <= int(value) <= _MAX_GID:
            raise ValueError(f"expected a gid from 1 to {_MAX_GID}")
        group = Group(str(value), int(value))
    else:
        try:
            group = Group(value, grp.getgrnam(value).gr_gid)
        except (KeyError, ValueError):
            raise ValueError(f"no group is named {described(value)}") from None
    if group.gid == 0:
        raise ValueError("root's group reaches what is root's: give the sockets another one")
    return group


def _groups(value: object) -> tuple[Group, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected a list of groups, not {described(value)}")
    return tuple(map(_group, value))


BackendGroups = Annotated[
    tuple[Group, ...],
    PlainValidator(_groups),
    PlainSerializer(lambda groups: [group.name for group in groups]),
]


def unreachable_sockets(configuration: "Configuration", source: Source) -> Iterator[Mistake]:
    """Warnings of backends' sockets that are there, and that none of the groups may connect to."""
    groups = configuration.worker.backend_groups
    if groups is None:
        return
    gids = {group.gid for group in groups}
    backends = [
        (f"vhost[{number}].{setting}", backend)
        for number, vhost in enumerate(configuration.vhost)
        for setting, backend in vhost.all_backends
    ]
    backends += [
        (f"tunnel[{number}].connect", backend)
        for number, tunnel in enumerate(configuration.tunnel)
        for backend in tunnel.connect
    ]
    for key, backend in backends:
        barrier = _barrier(backend.path, gids) if isinstance(backend, UnixAddress) else None
        # That of keyd.lend is our own: its group is the parent's, whichever that is.
        own = backend == configuration.keyd.lend and barrier is not None and barrier.is_socket()
        if barrier is not None and not own:
            yield source.mistake(
                key,
                f"{barrier} keeps titus-py from this socket, with the groups of "
                "worker.backend_groups: add its group there, and let the group in",
            )


def _barrier(path: str, gids: Collection[int]) -> Path | None:
    """What on the way to this socket neither everybody nor these groups may pass (unix(7))."""
    socket = Path(os.path.realpath(path))
    for step in (*reversed(socket.parents), socket):
        try:
            seen = step.stat()
        except OSError:
            # It may come later.
            return None
        right = os.W_OK if step == socket else os.X_OK
        if not seen.st_mode >> (3 if seen.st_gid in gids else 0) & right:
            return step
    return None
