"""Unix sockets (unix(7)): a file with its owner and mode from the start; who connected, who left.

Run by the supervisor and by keyd, as root. The directory may be one that others can write to. So
nothing is done by the path once the file is there: a link could be in its place.
"""

import errno
import os
import socket
import stat
import struct
from contextlib import suppress
from typing import NamedTuple

from keyd.linux.descriptors import if_any

__all__ = [
    "SO_PASSRIGHTS",
    "File",
    "Peer",
    "accept_from",
    "bind",
    "file_of",
    "has_ended",
    "peer_of",
    "refuse_descriptors",
    "set_access",
]

#: A file on this machine: its device, its inode there, and when it was made. After its end, the
#: inode's number may soon be another file's.
File = tuple[int, int, int]
#: <asm-generic/socket.h>; Python does not know it.
SO_PASSRIGHTS = 83
#: struct ucred (unix(7)): pid, uid, gid.
_CREDENTIALS = struct.Struct("iII")


def bind(
    listener: socket.socket, path: str, mode: int, owner: tuple[int, int] | None = None
) -> None:
    """bind(2), with this mode; ``owner`` is a uid and a gid, or nobody else than this process.

    Called while no other thread makes files: a process has one umask. Raises OSError.
    """
    mask = os.umask(0o777 & ~mode)
    try:
        listener.bind(path)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.umask(mask)
    if owner is not None:
        set_access(path, mode, owner)


def set_access(path: str, mode: int, owner: tuple[int, int], known: File | None = None) -> File:
    """Give a socket's file this mode, and this uid and gid; returns which file that is.

    It has to be the one that is ``known``, if any is.
    Raises OSError. To give it to another user takes CAP_CHOWN, and to a group CAP_SETGID alone.
    """
    file = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        seen = os.fstat(file)
        if not stat.S_ISSOCK(seen.st_mode) or (known is not None and file_of(seen) != known):
            raise FileExistsError(errno.EEXIST, "another file has taken its place", path)
        # By its descriptor, whatever the path leads to by now.
        by_descriptor = f"/proc/self/fd/{file}"
        if stat.S_IMODE(seen.st_mode) != mode:
            # Only its owner may change that.
            os.chown(by_descriptor, os.geteuid(), -1)
            os.chmod(by_descriptor, mode)
        groups = os.getgroups()
        with suppress(PermissionError):
            # Its owner may give it to a group that they are in.
            os.setgroups([*groups, owner[1]])
        try:
            os.chown(by_descriptor, *owner)
        finally:
            with suppress(PermissionError):
                os.setgroups(groups)
        return file_of(seen)
    finally:
        os.close(file)


def file_of(seen: os.stat_result) -> File:
    """Which file this is: nothing is ever written to a socket's."""
    return seen.st_dev, seen.st_ino, seen.st_mtime_ns


def refuse_descriptors(receiver: socket.SocketType) -> None:
    """Let nobody send it descriptors, where the kernel can refuse them (Linux 6.16).

    Of a listener, all that it accepts inherit this. A descriptor that nobody takes is closed by
    whoever reads what it came with, and closing may wait: a TCP socket's last holder, for as long
    as its SO_LINGER says, also with MSG_DONTWAIT.
    """
    with suppress(OSError):
        receiver.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)


class Peer(NamedTuple):
    """Who connected, as of then; ``pid`` is 0 for a process in a namespace that we do not see."""

    pid: int
    uid: int
    gid: int


def accept_from(listener: socket.SocketType) -> int:
    """accept(2): the descriptor, close-on-exec. Raises OSError.

    Python makes a socket of it in a dozen calls, and asks enumerations about it, which its users
    know.
    """
    return listener._accept()[0]  # type: ignore[attr-defined,no-any-return]


def peer_of(connection: socket.SocketType) -> Peer:
    octets = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Peer(*_CREDENTIALS.unpack(octets))


def has_ended(packets: socket.SocketType) -> bool:
    """Whether no octets from a SOCK_SEQPACKET socket are the end of file, and not an empty packet.

    An empty packet that is followed by another, or by the end of file, passes for the end.
    """
    return if_any(lambda: packets.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT), b"") == b""
