"""TLS servers in the test's own hands, by Python's ssl and the system's OpenSSL."""

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator

from .client_authority import ClientCertificate
from .peers import Listener, echo, served_by


def server_context(shown: ClientCertificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shown.chain, shown.key)
    return context


def echo_to_the_end(connection: ssl.SSLSocket) -> None:
    """Echo, and answer the client's close_notify with one."""
    echo(connection)
    with contextlib.suppress(OSError):
        connection.unwrap()


@contextlib.contextmanager
def tls_server(
    context: ssl.SSLContext,
    handle: Callable[[ssl.SSLSocket], None] = echo_to_the_end,
    before: Callable[[socket.socket], None] = lambda _: None,
    address: str = "127.0.0.1:0",
) -> Iterator[str]:
    """A server whose connections this function has, in threads; yields its address.

    ``before`` has each connection before TLS begins.
    """

    def serve(connection: socket.socket) -> None:
        before(connection)
        with context.wrap_socket(connection, server_side=True) as wrapped:
            handle(wrapped)

    host, _, port = address.rpartition(":")
    bound = socket.create_server((host, int(port)))
    address = f"{host}:{bound.getsockname()[1]}"
    with Listener(bound, address) as listener, served_by(listener, serve):
        yield address
