"""Clients of a unix socket, which have no address: named by whose process has connected.

Imported by the parent where it accepts from one. The kernel says which user it was, and which
process (SO_PEERCRED, unix(7)), as of the connect(2). For limits, a user is both an address and a
network: nobody has more than one without root's leave (subuid(5)).
"""

import socket

from keyd.linux.unix_socket import peer_of
from titus_py.between.closing import without_waiting
from titus_py.between.messages import Ends

__all__ = ["close_at_once", "unix_ends"]


def close_at_once(one: socket.SocketType) -> None:
    """A client, or a listening socket with those that wait there, whatever they have sent."""
    with without_waiting():
        one.close()


def unix_ends(client: socket.SocketType) -> Ends:
    """The user in the place of the address, and the process in that of the port."""
    peer = peer_of(client)
    return Ends(f"unix:uid={peer.uid}", peer.pid, f"unix:{client.getsockname()}", 0)
