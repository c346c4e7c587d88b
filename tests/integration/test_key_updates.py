"""KeyUpdates (RFC 8446 §4.6.3) of a client that does not read, while a write waits for it.

OpenSSL's own clients send none then. This one makes the records itself.
"""

import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from OpenSSL import SSL

from .conftest import Serve
from .instance import Instance
from .peers import Listener, connect, receive_all, reset
from .test_pump import MUCH, processor_ticks, tcp_queues, the_busy_worker, until_it_stands

ALERT, HANDSHAKE, DATA = 21, 22, 23
UPDATE_REQUESTED, UPDATE = b"\x18\0\0\1\1", b"\x18\0\0\1\0"
CLOSE_NOTIFY = b"\1\0"
#: Whether the rest of a message comes along with the client's close_notify.
with_its_end = pytest.mark.parametrize("with_its_end", [False, True], ids=["alone", "with its end"])
#: Of one of them, as a record.
RECORD_OCTETS = 27


class Writing:
    """The sending half of a TLS 1.3 client with AES-128-GCM (RFC 8446 §5.2, §7.1, §7.2)."""

    def __init__(self, secret: bytes) -> None:
        self._use(secret)

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._key = AESGCM(self._derived(b"key", 16))
        self._iv = int.from_bytes(self._derived(b"iv", 12))
        self._number = 0

    def _derived(self, label: bytes, length: int) -> bytes:
        info = struct.pack("!HB", length, 6 + len(label)) + b"tls13 " + label + b"\0"
        return HKDFExpand(hashes.SHA256(), length, info).derive(self._secret)

    def record(self, content: bytes, kind: int = HANDSHAKE) -> bytes:
        head = struct.pack("!BHH", 23, 0x0303, len(content) + 1 + 16)
        nonce = (self._iv ^ self._number).to_bytes(12)
        self._number += 1
        return head + self._key.encrypt(nonce, content + bytes((kind,)), head)

    def update(self) -> None:
        self._use(self._derived(b"traffic upd", 32))


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    with Listener.tcp() as listening:
        yield listening


@pytest.fixture(scope="module")
def instance(serve_all: Serve, listener: Listener) -> Instance:
    return serve_all(listener.address)


@contextmanager
def established(instance: Instance) -> Iterator[tuple[SSL.Connection, Writing]]:
    """A client that reads little at a time."""
    secrets: dict[str, bytes] = {}

    def keep(_: object, line: bytes) -> None:
        label, _, secret = line.decode().split()
        secrets[label] = bytes.fromhex(secret)

    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_tls13_ciphersuites(b"TLS_AES_128_GCM_SHA256")
    context.set_keylog_callback(keep)
    with connect(instance.port, receive_buffer=16384) as plain:
        plain.settimeout(None)
        client = SSL.Connection(context, plain)
        client.set_connect_state()
        client.do_handshake()
        yield client, Writing(secrets["CLIENT_TRAFFIC_SECRET_0"])


@contextmanager
def flooded(instance: Instance, listener: Listener) -> Iterator[tuple[SSL.Connection, Writing]]:
    """A client for which a write waits."""
    with established(instance) as (client, writing), listener.accept() as connection:
        plain = client._socket
        assert plain is not None
        feeder = threading.Thread(target=feed, args=[connection])
        feeder.start()
        until_it_stands(lambda: tcp_queues(instance.port, plain.getsockname()[1]))
        yield client, writing
        reset(plain)
        feeder.join()


def feed(connection: socket.socket) -> None:
    # The client may not want all of it.
    with suppress(OSError):
        connection.sendall(MUCH)


@with_its_end
def test_a_key_update_in_two_parts(
    instance: Instance, listener: Listener, with_its_end: bool
) -> None:
    """The write is tried again between the parts. Nothing may be sent twice."""
    with flooded(instance, listener) as (client, writing):
        plain = client._socket
        assert plain is not None
        plain.setblocking(False)
        plain.sendall(writing.record(UPDATE[:4]))
        received = all_there_is(client, plain)
        assert len(received) < len(MUCH)
        rest = writing.record(UPDATE[4:])
        writing.update()
        if with_its_end:
            rest += writing.record(CLOSE_NOTIFY, ALERT)
        plain.sendall(rest)
        plain.setblocking(True)
        while len(received) < len(MUCH):
            received += client.recv(1 << 16)
        assert received == MUCH


def all_there_is(client: SSL.Connection, plain: socket.socket) -> bytes:
    """What comes until nothing has for half a second."""
    received = bytearray()
    poll = select.poll()
    poll.register(plain, select.POLLIN)
    while client.pending() or poll.poll(500):
        # A part of a record, perhaps.
        with suppress(SSL.WantReadError):
            received += client.recv(1 << 16)
    return bytes(received)


def test_those_whose_answers_are_not_read_are_not_heard_without_end(
    instance: Instance, listener: Listener
) -> None:
    """Each answer would be held, and is as long as what asks for it."""
    with flooded(instance, listener) as (client, writing):
        plain = client._socket
        assert plain is not None
        port = plain.getsockname()[1]
        plain.setblocking(False)
        said = b""
        for _ in range(8000):
            said += writing.record(UPDATE_REQUESTED)
            writing.update()
        sent = plain.send(said)
        # What is not read waits here, or there.
        until_it_stands(lambda: (tcp_queues(port, instance.port), tcp_queues(instance.port, port)))
        waiting = tcp_queues(port, instance.port)[0] + tcp_queues(instance.port, port)[1]
        assert waiting + len(said) - sent > 1000 * RECORD_OCTETS


@with_its_end
def test_a_backend_may_end_in_the_middle_of_one(
    instance: Instance, listener: Listener, with_its_end: bool
) -> None:
    """OpenSSL makes no close_notify then. The client gets one once it has said the rest."""
    with established(instance) as (client, writing), listener.accept() as connection:
        plain = client._socket
        assert plain is not None
        plain.sendall(writing.record(b"before", DATA) + writing.record(UPDATE[:4]))
        assert connection.recv(100) == b"before"
        worker = the_busy_worker(instance, "{}:{}".format(*plain.getsockname()))
        connection.shutdown(socket.SHUT_WR)
        until_it_stands(lambda: processor_ticks(worker.pid))
        rest = writing.record(UPDATE[4:])
        writing.update()
        rest += writing.record(b"after", DATA)
        end = writing.record(CLOSE_NOTIFY, ALERT)
        plain.sendall(rest + end if with_its_end else rest)
        with pytest.raises(SSL.ZeroReturnError):
            client.recv(100)
        if not with_its_end:
            plain.sendall(end)
        assert receive_all(connection) == b"after"
        host, port = plain.getsockname()
        event = instance.wait_for_event("connection_ended", client=f"{host}:{port}")
        assert event["end"] == "clean"
