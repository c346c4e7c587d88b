"""What a worker said before it ended is heard, however soon it ended."""

import signal
import socket
import threading

import pytest

from .client_authority import ClientAuthority
from .conftest import Serve
from .instance import PATIENCE, eventually, free_port, zombies
from .peers import connect, receive_all, receive_exactly
from .tls_server import server_context, tls_server


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> ClientAuthority:
    return ClientAuthority(tmp_path_factory.mktemp("clients"))


def test_of_a_worker_that_left_a_message_unread(serve: Serve, authority: ClientAuthority) -> None:
    """The end of its socket is a reset then: it had no use for the channel to another keyd."""
    server, own = authority.issue(self_signed=True), authority.issue(self_signed=True)
    asked, goes_on = threading.Semaphore(0), threading.Event()

    def hold(connection: socket.socket) -> None:
        assert connection.recv(1, socket.MSG_PEEK)
        asked.release()
        assert goes_on.wait(PATIENCE)

    with tls_server(server_context(server), before=hold) as address:
        port = free_port()
        table = {
            "listen": f"127.0.0.1:{port}",
            "connect": address,
            "pins": [server.spki],
            "certificate": own.chain,
            "key": own.key,
        }
        instance = serve(
            listen=[], vhost=[], tunnel=[table], worker={"handshake_timeout": f"{PATIENCE:g}s"}
        )
        instance.expected_alarms.add("keyd_died")
        with connect(port) as client:
            assert asked.acquire(timeout=PATIENCE)
            instance.keyd().kill()
            with connect(port):
                # It got its channel after those who had lost theirs.
                assert asked.acquire(timeout=PATIENCE)
                parent = instance.parent()
                parent.kill(signal.SIGSTOP)
                try:
                    goes_on.set()
                    client.sendall(b"ping")
                    assert receive_exactly(client, 4) == b"ping"
                    client.shutdown(socket.SHUT_WR)
                    assert receive_all(client) == b""
                    eventually(lambda: zombies(parent.pid), "its worker has ended")
                finally:
                    parent.kill(signal.SIGCONT)
                name = "{}:{}".format(*client.getsockname())
                ended = instance.wait_for_event("connection_ended", client=name)
    assert ended["end"] == "clean"
    assert instance.events_named("connection_begun", client=name)
