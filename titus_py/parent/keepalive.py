"""TCP's keepalive (tcp(7)): how a peer that has vanished is noticed.

Run by the supervisor on listening sockets, whose accepted connections inherit it, and by the
parent on connections to backends.
"""

import socket

__all__ = ["PROBES", "keep_alive"]

#: How many probes are sent. They take as long as the silence before the first one.
PROBES = 4


def keep_alive(side: socket.SocketType, silence: float) -> None:
    """Probe a peer after so many seconds of silence; end the connection after twice as many.

    0 turns it off. No probe is sent while octets are on their way to the peer. TCP sends those
    again, for as long as the system's tcp_retries2 says. TCP_USER_TIMEOUT would shorten that, but
    would also end the connection of a peer that is alive and does not read.
    """
    side.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, bool(silence))
    if silence:
        side.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(silence)))
        side.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, round(silence / PROBES)))
        side.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
