"""Connecting to a backend from the client's own address (IP_TRANSPARENT, ip(7)).

Imported by the parent where a virtual host has ``source_address = "client"``. The address is the
one that the parent accepted the client from, or that its load balancer named. No message of a
worker that serves a client has an address in it.
"""

import socket
from collections.abc import Callable

from titus_py.between.plan import SocketAddress

__all__ = ["Bind", "from_address"]

#: Binds a socket that is about to be connected to this address; returns why it cannot, or nothing.
Bind = Callable[[socket.SocketType, SocketAddress], str]

# ip(7), ipv6(7). Python 3.11 does not know all of them.
_IP_TRANSPARENT, _IPV6_TRANSPARENT, _IP_BIND_ADDRESS_NO_PORT = 19, 75, 24
#: bind(2) takes these for whatever address the system then chooses: it would be our own.
_UNSPECIFIED = ("0.0.0.0", "::")


def from_address(client: str) -> Bind:
    """How to bind sockets to this numeric address."""
    if client.startswith("unix:"):
        return _no_address
    if "." in client:
        # An IPv4-mapped address (RFC 4291 §2.5.5.2) is the IPv4 address.
        client = client.rpartition(":")[2]
    family = socket.AF_INET6 if ":" in client else socket.AF_INET
    level, option = (
        (socket.IPPROTO_IPV6, _IPV6_TRANSPARENT)
        if family == socket.AF_INET6
        else (socket.IPPROTO_IP, _IP_TRANSPARENT)
    )

    def bind(attempt: socket.SocketType, address: SocketAddress) -> str:
        problem = _problem(client, family, attempt.family, address)
        if problem:
            return problem
        try:
            attempt.setsockopt(level, option, 1)
            # The port is chosen by connect(2): only then are all of them there for each backend.
            attempt.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            attempt.bind((client, 0))
        except OSError as error:
            return f"the client's address, {client}, cannot be bound: {error.strerror}"
        return ""

    return bind


def _no_address(_attempt: socket.SocketType, _address: SocketAddress) -> str:
    """A load balancer's own connection, such as a check; or a client that has connected itself."""
    return "the client is on a unix socket, and has no address"


def _problem(client: str, family: int, of_backend: int, address: SocketAddress) -> str:
    if family != of_backend:
        kind = "IPv6" if family == socket.AF_INET6 else "IPv4"
        return f"the client's address, {client}, is {kind}, and the backend's is not"
    if client in _UNSPECIFIED:
        return f"the client's address, {client}, is the unspecified one"
    if _is_loopback(client):
        return f"the client's address, {client}, does not leave this machine"
    if _is_loopback(str(address[0])):
        return "is on this machine, and its answers would not come back to titus-py"
    return ""


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")
