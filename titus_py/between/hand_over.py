"""Giving sockets away for good, between the parent and a worker.

Run by both. The last process to close a TCP socket may have to wait: its SO_LINGER says for
how long (socket(7)). An attacker who controls a worker can set that, leave data unsent, and
end. If the parent closed its own copy only afterwards, the parent would wait. So the sockets
travel in a socket pair of their own. The parent closes its copies before it sends the other
end of the pair to the worker. Before that, the worker cannot touch the sockets. After it, the
parent holds none of them.
"""

import socket
from collections.abc import Sequence
from socket import SocketType

from keyd.linux.descriptors import packet_pair, receive_descriptors, send_descriptors

__all__ = ["KEYD_FD", "PARENT_FD", "give", "take"]

#: The descriptor of the socket to the parent, in a worker and in the fork server.
PARENT_FD = 3
#: The descriptor of a worker's channel to keyd: the first number that is free while the socket
#: pair that brought the channel is open.
KEYD_FD = 5


def give(to: SocketType, message: bytes, sockets: Sequence[SocketType]) -> None:
    """Send a message and these sockets, which are closed in any case. Raises OSError."""
    try:
        ours, theirs = packet_pair()
    except OSError:
        for one in sockets:
            one.close()
        raise
    try:
        try:
            send_descriptors(ours, b"\0", [one.fileno() for one in sockets])
        finally:
            for one in (ours, *sockets):
                one.close()
        send_descriptors(to, message, [theirs.fileno()])
    finally:
        theirs.close()


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
