"""The files of unix sockets that clients connect to: made, given to their owner, removed.

Run by the supervisor, as root. The directory may be another user's. So no link is followed, and
only a socket that nobody serves is ever replaced; only a file that was made here is changed or
removed.
"""

import errno
import os
import socket
import stat
from contextlib import suppress

from keyd.linux.unix_socket import File, bind, file_of, refuse_descriptors, set_access
from titus_py.configuration.address import UnixAddress
from titus_py.configuration.socket_access import SocketAccess

__all__ = ["is_there", "listen_at", "remove", "update"]


def listen_at(
    address: UnixAddress, access: SocketAccess, backlog: int
) -> tuple[socket.socket, File]:
    """A socket that listens, and its file. Raises OSError, whose ``strerror`` is for people."""
    _make_room(address.path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    refuse_descriptors(listener)
    try:
        # Before it listens, nobody can connect, whatever the file's group is at first.
        bind(listener, address.path, access.mode)
        made = set_access(address.path, access.mode, access.owner)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener, made


def update(address: UnixAddress, file: File, access: SocketAccess) -> None:
    """Set the mode and the owner of a file that was made here. Raises OSError."""
    set_access(address.path, access.mode, access.owner, file)


def is_there(address: UnixAddress, file: File) -> bool:
    """Whether this file still is what clients find there."""
    try:
        found = os.lstat(address.path)
    except OSError:
        return False
    return file_of(found) == file


def remove(address: UnixAddress, file: File) -> None:
    """Remove the file, unless another one has taken its place."""
    if is_there(address, file):
        with suppress(OSError):
            os.unlink(address.path)


def _make_room(path: str) -> None:
    """Remove a socket that a crash has left. Raises FileExistsError if something else is there."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise _taken("a symbolic link is there, which is not followed: remove it")
    if not stat.S_ISSOCK(mode):
        raise _taken("a file that is no socket is there, and is not replaced: remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        # EAGAIN: its queue is full. EPROTOTYPE: it is of another kind. Somebody has it.
        outcome = probe.connect_ex(path)
    if outcome == errno.ECONNREFUSED:
        with suppress(FileNotFoundError):
            os.unlink(path)
    elif outcome != errno.ENOENT:
        raise _taken("another process serves this socket: end it, or set another path")


def _taken(reason: str) -> FileExistsError:
    return FileExistsError(errno.EEXIST, reason)
