"""The step before TLS that PostgreSQL's clients make: asking for it. Run by the parent.

Loaded only where a listener has ``starttls``. Eight octets are compared with two constants, taken
out of the socket, and answered by one. The ClientHello comes after that, and no worker has the
connection before it has been seen. A client that begins TLS without asking is served as well.
"""

import socket

from titus_py.between.postgresql import ASKING, NO, REQUEST_OCTETS, SSL_REQUEST, YES
from titus_py.parent.first_flight import FirstFlight, look

__all__ = ["look_before_tls"]


def look_before_tls(client: socket.SocketType, octets: bytes) -> tuple[FirstFlight, bool]:
    """Look at what has come, and answer a client that asks for TLS.

    Returns what can be said of its first octets, and whether it may still ask. Raises OSError if
    the client does not take an answer.
    """
    request = octets[:REQUEST_OCTETS]
    if request not in ASKING:
        if any(one.startswith(request) for one in ASKING):
            return FirstFlight(REQUEST_OCTETS), True
        return look(octets), False
    client.recv(REQUEST_OCTETS)
    if request == SSL_REQUEST:
        client.send(YES)
        return look(octets[REQUEST_OCTETS:]), False
    # For Kerberos: most often, TLS is asked for next.
    client.send(NO)
    return FirstFlight(REQUEST_OCTETS), True
