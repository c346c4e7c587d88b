"""keyd ends while clients are in their handshake: the next keyd answers for it, once."""

import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from OpenSSL import SSL

from .client_authority import ClientAuthority
from .conftest import Certificates, Serve
from .instance import PATIENCE, Instance, eventually, free_port
from .peers import Listener, TlsClient, connect, receive_exactly
from .service import FAILS, serves, talk
from .tls_server import server_context, tls_server

#: A first ClientHello without a key for the group that is taken: it is answered with a
#: HelloRetryRequest, and nothing is signed for it.
_TWO_HELLOS = ["X25519", "X25519MLKEM768"]


def begin(instance: Instance, client: TlsClient) -> None:
    """Have a client say its first message, and a worker and keyd hear of it."""
    since = len(instance.events())
    client.socket.sendall(client.first_flight())
    instance.wait_for_event("connection_begun", since=since)


@pytest.mark.parametrize(
    ("version", "groups"),
    [
        (SSL.TLS1_3_VERSION, None),
        (SSL.TLS1_3_VERSION, _TWO_HELLOS),
        (SSL.TLS1_2_VERSION, None),
    ],
    ids=["1.3", "1.3, two hellos", "1.2"],
)
def test_a_client_that_keyd_did_not_come_to_is_served_by_the_next(
    serve: Serve, echoing: Listener, version: int, groups: Sequence[str] | None
) -> None:
    instance = serve(echoing.address, worker={"handshake_timeout": f"{PATIENCE:g}s"})
    instance.expected_alarms.add("keyd_died")
    keyd = instance.keyd()
    # From here on, it takes nothing out of its sockets.
    keyd.kill(signal.SIGSTOP)
    with (
        TlsClient(instance.port, versions=(version, version), groups=groups) as client,
        TlsClient(instance.port, versions=(version, version), groups=groups) as another,
    ):
        for one in (client, another):
            begin(instance, one)
        keyd.kill()
        for one in (client, another):
            assert talk(one.handshake())
    assert not instance.events_named("handshake_failed")


def test_a_request_that_keyd_had_not_answered_is_answered_by_the_next(
    serve: Serve, echoing: Listener
) -> None:
    """Its channel was open."""
    instance = serve(echoing.address, worker={"handshake_timeout": f"{PATIENCE:g}s"})
    instance.expected_alarms.add("keyd_died")
    keyd = instance.keyd()
    with TlsClient(instance.port, groups=_TWO_HELLOS) as client:
        begin(instance, client)
        # A channel that was opened after this one has been used: keyd takes them in turn.
        assert serves(instance)
        keyd.kill(signal.SIGSTOP)
        client.received += client.socket.recv(65536)
        client.tls.bio_write(client.received)
        with pytest.raises(SSL.WantReadError):
            client.tls.do_handshake()
        client.socket.sendall(client.tls.bio_read(65536))
        keyd.kill()
        assert talk(client.handshake())


def test_a_client_that_has_its_signature_needs_no_keyd(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address, worker={"handshake_timeout": f"{PATIENCE:g}s"})
    instance.expected_alarms.add("keyd_died")
    with TlsClient(instance.port) as client:
        client.socket.sendall(client.first_flight())
        # All of the server's flight comes at once.
        assert client.socket.recv(1, socket.MSG_PEEK)
        since = len(instance.events())
        instance.keyd().kill()
        instance.wait_for_event("keyd_started", since=since)
        assert serves(instance)
        assert talk(client.handshake())


def test_who_has_lost_a_second_keyd_fails(serve: Serve, echoing: Listener) -> None:
    """It may be what ends them."""
    instance = serve(echoing.address, worker={"handshake_timeout": f"{PATIENCE:g}s"})
    instance.expected_alarms.add("keyd_died")
    with TlsClient(instance.port, groups=_TWO_HELLOS) as client:
        begin(instance, client)
        for _ in range(2):
            since = len(instance.events())
            instance.keyd().kill()
            instance.wait_for_event("keyd_started", since=since)
            assert serves(instance)
        with pytest.raises(FAILS):
            client.handshake()
    ended = instance.wait_for_event("handshake_failed")
    assert ended["detail"].startswith("keyd is gone")


def test_a_tunnel_shows_its_certificate_by_the_next_keyd(
    serve: Serve, echoing: Listener, certificates: Certificates, tmp_path: Path
) -> None:
    """Its server is the same instance's, and waits as well."""
    site = certificates("P-256", "site.test")
    known = ClientAuthority(tmp_path).issue(self_signed=True)
    at, port = f"127.0.0.1:{free_port()}", free_port()
    instance = serve(
        echoing.address,
        listen=[{"address": at}],
        vhost=[
            {
                "certificate": site.certificate,
                "key": site.key,
                "client_certificates": "required",
                "client_allow": {"spki": [known.spki]},
            }
        ],
        tunnel=[
            {
                "listen": f"127.0.0.1:{port}",
                "connect": at,
                "ca": site.authority,
                "server_name": "site.test",
                "certificate": known.chain,
                "key": known.key,
            }
        ],
        worker={"handshake_timeout": f"{PATIENCE:g}s"},
    )
    instance.expected_alarms.add("keyd_died")
    keyd = instance.keyd()
    keyd.kill(signal.SIGSTOP)
    with connect(port) as client:
        instance.wait_for_event("connection_begun")
        keyd.kill()
        client.sendall(b"ping")
        assert receive_exactly(client, 4) == b"ping"


def test_a_tunnel_keeps_no_channel_that_it_had_no_use_for(
    serve: Serve, certificates: Certificates, echoing: Listener, tmp_path: Path
) -> None:
    """Its server asked for no certificate. Past the handshake, there is no way to keyd."""
    authority = ClientAuthority(tmp_path)
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
        without = instance.keyd().descriptors
        with connect(port) as client:
            assert asked.acquire(timeout=PATIENCE)
            since = len(instance.events())
            instance.keyd().kill()
            instance.wait_for_event("keyd_started", since=since)
            keyd = instance.keyd()
            with connect(port) as later:
                # It got its channel after those who had lost theirs.
                assert asked.acquire(timeout=PATIENCE)
                eventually(lambda: keyd.descriptors == without + 2, "both have a channel")
                goes_on.set()
                for one in (client, later):
                    one.sendall(b"ping")
                    assert receive_exactly(one, 4) == b"ping"
                eventually(lambda: keyd.descriptors == without, "no channel is left")
