"""Ending one side's connection, at the level of TCP.

Run by the worker. If the last octets matter, the close has to wait until they have arrived: a
reset from our own kernel would overtake them (tcp(7), SO_LINGER).
"""

import fcntl
import select
import socket
import struct
import time
from contextlib import suppress
from socket import SocketType

__all__ = ["SIOCINQ", "SIOCOUTQ", "part", "stop_resetting", "unacknowledged", "unread"]

# tcp(7), unix(7)
SIOCINQ, SIOCOUTQ = 0x541B, 0x5411
#: How long a peer has to read the last word, in seconds, and how many octets it may send meanwhile.
_SECONDS = 1.0
_OCTETS = 16 * 1024 * 1024
_PIECE_OCTETS = 64 * 1024


def stop_resetting(side: SocketType) -> None:
    """Let the connection be closed cleanly."""
    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))


def unacknowledged(side: SocketType) -> int:
    """How many octets were sent that the peer's kernel has not acknowledged.

    0 if the peer has reset the connection. 0 for a unix socket: the peer has the octets at once.
    """
    if side.family == socket.AF_UNIX:
        return 0
    poll = select.poll()
    poll.register(side, 0)
    if any(events & select.POLLERR for _, events in poll.poll(0)):
        return 0
    return _ask(side, SIOCOUTQ)


def unread(side: SocketType) -> int:
    """How many octets have come that were not read yet."""
    return _ask(side, SIOCINQ)


def _ask(side: SocketType, request: int) -> int:
    number: int = struct.unpack("=i", fcntl.ioctl(side.fileno(), request, bytes(4)))[0]
    return number


def part(side: SocketType, last_word: bytes = b"") -> None:
    """Send the last word, if it has not been sent yet; close when the peer has ended its side.

    Close earlier if that takes too long. What the peer sends meanwhile is thrown away: unread, it
    would make the close a reset, and the peer might not get what was sent before. RFC 8446 §6.2
    has a TLS alert sent first, and the connection closed after it.
    """
    stop_resetting(side)
    with suppress(OSError):
        if last_word:
            side.send(last_word)
        side.shutdown(socket.SHUT_WR)
        deadline, left = time.monotonic() + _SECONDS, _OCTETS
        poll = select.poll()
        poll.register(side, select.POLLIN)
        while left > 0 and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            octets = len(side.recv(_PIECE_OCTETS))
            if not octets:
                break
            left -= octets
    side.close()
