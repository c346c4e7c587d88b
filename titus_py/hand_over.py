"""Giving sockets away for good, between the parent and a worker.

Run by both. Whoever closes a TCP socket last may have to wait: its SO_LINGER says for
how long (socket(7)), and a worker that was taken over can set that, leave data unsent,
and end. If the parent closed its own copy only afterwards, it would be the parent
that waits. So the sockets travel in a socket pair of their own, closed here before the
other end of the pair goes to the worker: the worker cannot touch what it does not have
yet, and from then on the parent holds nothing.
"""

import socket
import struct
from collections.abc import Sequence
from socket import SocketType

__all__ = ["give", "take"]

_INT = struct.Struct("=i")


def give(to: socket.socket, message: bytes, sockets: Sequence[socket.socket]) -> None:
    """Send a message and these sockets, which are closed in any case. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            with ours:
                socket.send_fds(ours, [b"\0"], [one.fileno() for one in sockets])
        finally:
            for one in sockets:
                one.close()
        socket.send_fds(to, [message], [theirs.fileno()])


def take(giver: SocketType, octets: int, count: int) -> tuple[bytes, list[int]]:
    """Receive a message of at most so many octets and up to ``count`` descriptors.

    An empty message says that the other side is gone.
    """
    message, pair = _receive(giver, octets, 1)
    if not pair:
        return message, []
    inner = SocketType(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, pair[0])
    try:
        return message, _receive(inner, 1, count)[1]
    finally:
        inner.close()


def _receive(giver: SocketType, octets: int, count: int) -> tuple[bytes, list[int]]:
    """socket.recv_fds for a socket as the C library has it: a worker has no others."""
    message, ancillary, _, _ = giver.recvmsg(octets, socket.CMSG_SPACE(count * _INT.size))
    descriptors = [number for _, _, data in ancillary for (number,) in _INT.iter_unpack(data)]
    return message, descriptors
