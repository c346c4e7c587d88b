"""The step before TLS of a tunnel to PostgreSQL: asking the server for it.

Run by the worker, and loaded only where a tunnel has ``starttls``. The server's one octet comes in
the clear, and anybody may have sent it: what follows is TLS, and a server that is judged. Nothing
beyond that octet is read before TLS.
"""

import select
import time
from contextlib import suppress
from socket import SocketType

from OpenSSL import SSL

from titus_py.between.postgresql import ASKING, NO, REQUEST_OCTETS, SSL_REQUEST, YES

__all__ = ["ask", "decline"]


def ask(server: SocketType, deadline: float) -> str:
    """Ask a server for TLS; returns why there is none, or nothing. Raises OSError, TimeoutError."""
    server.send(SSL_REQUEST)
    octet = _receive(server, 1, deadline)
    if not octet and time.monotonic() >= deadline:
        raise TimeoutError
    if octet == YES:
        return ""
    if octet == NO:
        return "the server has no TLS"
    return "the server ended" if not octet else f"no server of PostgreSQL: it says {octet!r}"


def decline(client: SocketType, server: SSL.Connection, deadline: float) -> int:
    """Tell a client that asks for TLS that there is none here.

    The first octets that ask for something else are the server's; returns how many there were. A
    client that says nothing in time, or ends, is left to the pump. Raises SSL.Error.
    """
    with suppress(OSError):
        while (octets := _receive(client, REQUEST_OCTETS, deadline)) in ASKING:
            client.send(NO)
        if octets:
            # They are few, and the first: there is room for them.
            return server.send(octets)
    return 0


def _receive(side: SocketType, count: int, deadline: float) -> bytes:
    """So many octets, or what there is before the end of the stream, or of the time."""
    octets = b""
    poll = select.poll()
    poll.register(side, select.POLLIN)
    while len(octets) < count:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            break
        with suppress(BlockingIOError):
            piece = side.recv(count - len(octets))
            if not piece:
                break
            octets += piece
    return octets
