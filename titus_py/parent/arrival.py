"""A client that has been accepted, and has no worker yet. Used by the parent."""

import socket
from typing import NamedTuple

from titus_py.between.messages import Ends
from titus_py.parent.backend import Backend

__all__ = ["Arrival"]


class Arrival(NamedTuple):
    """Addresses are numeric."""

    client: socket.SocketType
    address: str
    port: int
    local_address: str
    local_port: int
    #: When it came, and once its ClientHello has come, when it began to wait for a worker
    #: (time.monotonic()).
    since: float
    #: How many ms the client's load balancer has for a header. 0: the address is the client's.
    proxy_timeout: int = 0
    #: The message with its header, as it was seen in the socket; empty if it is none.
    client_hello: bytes = b""
    #: Which tunnel it is for, and once that has been connected: its server's socket, and whose.
    tunnel: int | None = None
    server: socket.SocketType | None = None
    backend: Backend | None = None
    #: Whether it may first ask for TLS, as PostgreSQL's clients do.
    starttls: bool = False

    @property
    def ends(self) -> Ends:
        return Ends(self.address, self.port, self.local_address, self.local_port)
