"""What may follow the server's close_notify: nothing (RFC 8446 §6.1)."""

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from integration.test_key_updates import (
    ALERT,
    CLOSE_NOTIFY,
    DATA,
    UPDATE_REQUESTED,
    Writing,
)
from OpenSSL import SSL

from titus_py.audit.throwaway_authority import ThrowawayAuthority
from titus_py.between.report import End
from titus_py.worker.pump import Pump


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    """A client's and ours, ours and a backend's."""
    both = [*socket.socketpair(), *socket.socketpair()]
    yield both
    for one in both:
        one.close()


def hands_shaken(directory: Path) -> tuple[SSL.Connection, SSL.Connection, Writing]:
    """A server and its client in memory, and how the client writes from now on."""
    certificate, key = directory / "certificate", directory / "key"
    issued = ThrowawayAuthority().issue("P-256", ["localhost"])
    context, client_context = (
        SSL.Context(method) for method in (SSL.TLS_SERVER_METHOD, SSL.TLS_CLIENT_METHOD)
    )
    certificate.write_bytes(issued.certificate)
    key.write_bytes(issued.key)
    context.use_certificate_chain_file(str(certificate))
    context.use_privatekey_file(str(key))
    context.set_options(SSL.OP_NO_TICKET)
    context.set_tls13_ciphersuites(b"TLS_AES_128_GCM_SHA256")
    secrets: dict[bytes, bytes] = {}

    def keep(_: object, line: bytes) -> None:
        label, _, secret = line.split()
        secrets[label] = bytes.fromhex(secret.decode())

    client_context.set_keylog_callback(keep)
    server, client = SSL.Connection(context), SSL.Connection(client_context)
    server.set_accept_state()
    client.set_connect_state()
    for _ in range(3):
        for side, other in ((client, server), (server, client)):
            with suppress(SSL.WantReadError):
                side.do_handshake()
            with suppress(SSL.WantReadError):
                other.bio_write(side.bio_read(1 << 16))
    # Tickets, which no titus-py sends.
    with suppress(SSL.WantReadError):
        client.recv(1)
    return server, client, Writing(secrets[b"CLIENT_TRAFFIC_SECRET_0"])


def fill(side: socket.socket) -> int:
    """Have it take nothing more; returns how much it has taken."""
    side.setblocking(False)
    octets = 0
    for size in (4096, 1):
        with suppress(BlockingIOError):
            while True:
                octets += side.send(bytes(size))
    return octets


def test_not_even_the_answer_to_a_key_update(sockets: list[socket.socket], tmp_path: Path) -> None:
    """That comes while the client's socket takes nothing, and so holds the close_notify up."""
    plain, ours, backends, backend = sockets
    server, client, writing = hands_shaken(tmp_path)
    before = fill(ours)
    backends.setblocking(False)
    counts = memoryview(bytearray(8)).cast("Q"), memoryview(bytearray(8)).cast("Q")
    pump = Pump(10, 10)
    pump.begin(server, ours, counts, True)
    pump._backend = backends
    backend.shutdown(socket.SHUT_WR)

    def go_on() -> None:
        """Until there is nothing to do."""
        while not pump._pass_on(0)[1]:
            pass

    go_on()
    for _ in range(2):
        plain.sendall(writing.record(UPDATE_REQUESTED))
        writing.update()
    plain.sendall(writing.record(b"after that", DATA))
    go_on()
    # What it says is heard.
    assert backend.recv(100) == b"after that"
    plain.sendall(writing.record(CLOSE_NOTIFY, ALERT))
    read = 0
    while read < before:
        read += len(plain.recv(before - read))
    assert pump.run(backends) == (End.CLEAN, "")
    last = plain.recv(1 << 16)
    client.bio_write(last)
    with pytest.raises(SSL.ZeroReturnError):
        client.recv(1)
    # A record with two octets, their kind, and a tag.
    assert len(last) == 5 + 2 + 1 + 16
    assert plain.recv(1) == b""
