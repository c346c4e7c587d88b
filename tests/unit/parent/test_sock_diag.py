"""What the kernel says of real connections."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from integration.namespaces import ip, new_namespace, within

from titus_py.between.messages import Ends
from titus_py.parent.backends import _ends
from titus_py.parent.sock_diag import CLOSE_WAIT, SockDiag

ESTABLISHED = 1


@contextmanager
def connection(host: str) -> Iterator[tuple[socket.socket, socket.socket, Ends]]:
    """The client's end, the server's, and their names as the parent has them."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection((host, port)) as client:
            server, _ = listener.accept()
            with server, SockDiag():
                yield client, server, Ends(host, client.getsockname()[1], host, port)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_how_long_it_has_stood_still_and_when_it_is_over(host: str) -> None:
    with connection(host) as (client, server, ends), SockDiag() as kernel:
        time.sleep(0.3)
        seen = kernel.look(ends)
        assert seen is not None
        assert seen.state == ESTABLISHED
        assert 0.2 < seen.silent_in < 60
        assert 0.2 < seen.silent_out < 60
        sent = time.monotonic()
        client.send(b"x")
        assert server.recv(1)
        after = kernel.look(ends)
        assert after is not None
        # Since then, and not since the beginning; the kernel counts in ticks.
        assert after.silent_in < time.monotonic() - sent + 0.2
        assert after.silent_out >= seen.silent_out
        client.shutdown(socket.SHUT_WR)
        assert not server.recv(1)
        half = kernel.look(ends)
        assert half is not None
        assert half.state == CLOSE_WAIT
        server.close()
        # What remains is the client's end, or a listening socket that would take such a client.
        assert kernel.look(ends) is None
        assert kernel.look(ends._replace(client_port=1)) is None
        assert kernel.look(ends._replace(server_port=1)) is None


def test_a_reset_connection_is_over_although_its_socket_is_open() -> None:
    with connection("127.0.0.1") as (client, server, ends), SockDiag() as kernel:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        with pytest.raises(ConnectionResetError):
            server.recv(1)
        assert kernel.look(ends) is None
        assert server.fileno() >= 0


def test_a_backend_at_a_link_local_address_is_found_by_its_interface() -> None:
    def look() -> tuple[int, bool, bool]:
        ip("link", "add", "cable", "type", "veth", "peer", "name", "its-other-end")
        ip("link", "set", "lo", "up")
        ip("link", "set", "cable", "up")
        ip("link", "set", "its-other-end", "up")
        ip("address", "add", "fe80::7/64", "dev", "cable", "nodad")
        scope = socket.if_nametoindex("cable")
        with socket.create_server(("::", 0), family=socket.AF_INET6) as listener:
            backend = ("fe80::7", listener.getsockname()[1], 0, scope)
            with socket.socket(socket.AF_INET6) as connected:
                connected.connect(backend)
                ends = _ends(connected)
                assert ends is not None
                host = ends.client.partition("%")[0]
                with SockDiag() as kernel:
                    seen = kernel.look(ends)
                    without = kernel.look(ends._replace(client=host))
        assert seen is not None
        return seen.state, host == "fe80::7", without is None

    namespace = new_namespace()
    try:
        assert within(namespace, look) == (ESTABLISHED, True, True)
    finally:
        os.close(namespace)
