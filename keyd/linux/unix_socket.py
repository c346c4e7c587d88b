"""Unix sockets (unix(7)): a file with its owner and mode from the start; who connected, who left.

Run by the supervisor and by keyd, as root. The directory may be one that others can write to. So
nothing is done by the path once the file is there: a link could be in its place.
"""

import os
import socket
import stat
import struct

__all__ = ["bind", "has_ended", "peer_process"]

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
    finally:
        os.umask(mask)
    if owner is not None:
        file = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not stat.S_ISSOCK(os.fstat(file).st_mode):
                raise FileExistsError(f"{path}: another file has taken its place")
            # By its descriptor, whatever the path leads to by now.
            os.chown(f"/proc/self/fd/{file}", *owner)
        finally:
            os.close(file)


def peer_process(connection: socket.socket) -> int:
    """The pid of the process that connected; 0 if it is in a namespace that we do not see."""
    octets = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(octets)[0]
    return pid


def has_ended(packets: socket.socket) -> bool:
    """Whether no octets from a SOCK_SEQPACKET socket are the end of file, and not an empty packet.

    An empty packet that is followed by another, or by the end of file, passes for the end.
    """
    try:
        return not packets.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
