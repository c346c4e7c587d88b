"""TCP's keepalive (tcp(7)): how a peer that has vanished is noticed.

Run by the supervisor, on listening sockets, from which what they accept inherits it, and by
the parent, on connections to backends.
"""

import socket

__all__ = ["PROBES", "keep_alive"]

#: How many are sent, in as long a time as the peer was silent before the first.
PROBES = 4


def keep_alive(side: socket.socket, silence: float) -> None:
    """Ask a peer that was silent for so many seconds, and end the connection at twice that.

    0 turns it off. Nothing is asked while octets are on their way to the peer: those are sent
    again, for as long as the system's tcp_retries2 says. TCP_USER_TIMEOUT would make that
    shorter, and would also end the connection of a peer that is there and does not read.
    """
    side.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, bool(silence))
    if silence:
        side.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(silence)))
        side.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, round(silence / PROBES)))
        side.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
