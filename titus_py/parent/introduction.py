"""Introducing a client to its backend: the PROXY header, written before anything else.

Imported by the parent where a virtual host sends one. The parent writes the header because it
accepted the client: a worker may be controlled by its client by now, and would name any address.
The worker gets the backend's socket only after that.
"""

import socket
from typing import TYPE_CHECKING

from titus_py.between.messages import Ends, TlsFacts
from titus_py.parent.proxy_header import CannotEncode, version_1, version_2

if TYPE_CHECKING:
    from titus_py.between.client_identity import Identity

__all__ = ["introduce"]


def introduce(
    backend: socket.SocketType,
    how: str,
    ends: Ends,
    facts: TlsFacts | None,
    protocol: str | None,
    identity: "Identity | None",
    client_name: str | None = None,
) -> str:
    """Write the header that the virtual host's ``send_proxy`` asks for, in one piece.

    ``backend`` is non-blocking, and nothing has been written to it yet. Returns why that did not
    succeed, or nothing. A backend that has got a part of a header is of no use to anybody.
    """
    try:
        match how:
            case "v1":
                header = version_1(ends)
            case "v2":
                header = version_2(ends)
            case "v2-tls":
                header = version_2(ends, facts, protocol)
            case _:
                header = version_2(ends, facts, protocol, identity, client_name)
        written = backend.send(header)
    except CannotEncode as error:
        return f"PROXY header: {error}"
    except OSError as error:
        return f"PROXY header: {error.strerror}"
    if written < len(header):
        return f"PROXY header: {written} of {len(header)} octets were taken"
    return ""
