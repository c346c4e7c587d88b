"""Giving sockets away for good, between the parent and a worker.

Run by both. The last process to close a TCP socket may have to wait: its SO_LINGER says for
how long (socket(7)). An attacker who controls a worker can set that, leave data unsent, and
end. If the parent closed its own copy only afterwards, the parent would wait. So the sockets
travel within a socket pair. The parent closes its copies before it sends the other
end of the pair to the worker. Before that, the worker cannot touch the sockets. After it, the
parent holds none of them. A client comes within its worker's channel to keyd, which is such a pair:
what the parent has put in at keyd's end, only the worker's end can take out.
"""

import socket
from collections.abc import Sequence
from socket import SocketType

from keyd.linux.descriptors import packet_pair, receive_descriptors, send_descriptors

__all__ = ["KEYD_FD", "PARENT_FD", "enclose", "give", "take"]

#: The descriptor of the socket to the parent, in a worker and in the fork server.
PARENT_FD = 3
#: The descriptor of a worker's channel to keyd: the first number that is free when it comes.
KEYD_FD = 4
#: What sockets come with: whether the pair was made for them, or is a channel and is to be kept.
_MADE, _CHANNEL = b"\0", b"\1"


def enclose(channel: SocketType, sockets: Sequence[SocketType]) -> None:
    """Put sockets in at keyd's end of a channel, before anybody else has it. Raises OSError."""
    send_descriptors(channel, _CHANNEL, [one.fileno() for one in sockets])


def give(
    to: SocketType,
    message: bytes,
    sockets: Sequence[SocketType],
    channel: SocketType | None = None,
) -> None:
    """Send a message and these sockets, which are closed in any case. Raises OSError.

    ``channel`` is the worker's end of the one that they have been put into, if they have.
    """
    try:
        within = channel or _pair_with(sockets)
    finally:
        for one in sockets:
            one.close()
    try:
        send_descriptors(to, message, [within.fileno()])
    finally:
        within.close()


def _pair_with(sockets: Sequence[SocketType]) -> SocketType:
    """One end of a new pair, in which they are."""
    ours, theirs = packet_pair()
    try:
        send_descriptors(ours, _MADE, [one.fileno() for one in sockets])
    except OSError:
        theirs.close()
        raise
    finally:
        ours.close()
    return theirs


def take(giver: SocketType, octets: int, count: int) -> tuple[bytes, list[int]]:
    """Receive a message of at most so many octets and up to ``count`` sockets' descriptors.

    If they come within a channel, that is the first. An empty message says that the other side is
    gone.
    """
    message, pair = receive_descriptors(giver, octets, 1)
    if not pair:
        return message, []
    within = SocketType(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, pair[0])
    try:
        kind, sockets = receive_descriptors(within, 1, count)
        if kind == _CHANNEL:
            return message, [within.detach(), *sockets]
        return message, sockets
    finally:
        within.close()
