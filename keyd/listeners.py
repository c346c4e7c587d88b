"""The sockets that a keyd of its own hears: those that systemd passed, or one that it makes.

Run by ``keyd listen`` and ``keyd control`` before they are confined, as root or as the user that a
service manager chose.
"""

import argparse
import os
import pwd
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from keyd.accounts import gid_of, user_of
from keyd.linux.systemd import passed_sockets
from keyd.linux.unix_socket import bind

__all__ = ["listeners", "owner_of", "paths_of"]

_BACKLOG = 128


def owner_of(arguments: argparse.Namespace) -> tuple[int, int]:
    """The uid and the gid of the socket of ``keyd listen``. Raises LookupError."""
    user = user_of(arguments.user) if arguments.user else pwd.getpwuid(os.geteuid())
    return user.pw_uid, gid_of(arguments.group) if arguments.group else user.pw_gid


def listeners(
    arguments: argparse.Namespace,
    stack: ExitStack,
    owner: Callable[[], tuple[int, int]],
    mode: int,
) -> list[socket.socket]:
    """The sockets that systemd passed, or else a new one at the path that was asked for."""
    passed = [one for sockets in passed_sockets().values() for one in sockets]
    if passed:
        return [stack.enter_context(one) for one in passed]
    if arguments.socket is None:
        raise LookupError("no --socket, and none was passed by systemd")
    path = Path(arguments.socket)
    listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    try:
        if path.is_socket():
            path.unlink()
        bind(listener, str(path), mode, owner() if os.geteuid() == 0 else None)
    except OSError as error:
        raise LookupError(f"cannot listen at {path}: {error.strerror or error}") from None
    listener.listen(_BACKLOG)
    return [listener]


def paths_of(sockets: list[socket.socket]) -> list[str]:
    """Where they can be connected to."""
    return [str(one.getsockname()) for one in sockets]
