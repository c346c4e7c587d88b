"""Giving sockets away for good, between the parent and a worker.

Run by both. The last process to close a TCP socket may have to wait: its SO_LINGER says for
how long (socket(7)), and a worker that was taken over can set that, leave data unsent,
and end. If the parent closed its own copy only afterwards, it would be the parent
that waits. So the sockets travel in a socket pair of their own, closed here before the
other end of the pair goes to the worker: the worker cannot touch what it does not have
yet, and from then on the parent holds nothing.
"""

import socket
from collections.abc import Sequence
from socket import SocketType

from keyd.linux.descriptors import receive_descriptors, send_descriptors

__all__ = ["KEYD_FD", "PARENT_FD", "give", "take"]

#: Where a worker, and the fork server, find the socket to the parent.
PARENT_FD = 3
#: Where a worker finds its channel to keyd: the first number that is free while the pair
#: that brought it is open.
KEYD_FD = 5


def give(to: socket.socket, message: bytes, sockets: Sequence[socket.socket]) -> None:
    """Send a message and these sockets, which are closed in any case. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            with ours:
                send_descriptors(ours, b"\0", [one.fileno() for one in sockets])
        finally:
            for one in sockets:
                one.close()
        send_descriptors(to, message, [theirs.fileno()])


def take(giver: SocketType, octets: int, count: int) -> tuple[bytes, list[int]]:
    """Receive a message of at most so many octets and up to ``count`` descriptors.

    An empty message says that the other side is gone.
    """
    message, pair = receive_descriptors(giver, octets, 1)
    if not pair:
        return message, []
    inner = SocketType(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, pair[0])
    try:
        return message, receive_descriptors(inner, 1, count)[1]
    finally:
        inner.close()
