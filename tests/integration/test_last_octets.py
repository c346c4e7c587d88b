"""What either side sent before an end arrives before that end does."""

import fcntl
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from OpenSSL import SSL

from .conftest import Serve
from .instance import Instance, eventually
from .peers import (
    Listener,
    TlsClient,
    connect,
    receive_all,
    receive_exactly,
    reset,
    was_reset,
)
from .test_pump import MUCH, Pair, connected, end_of, ended, the_busy_worker

SIOCOUTQ = 0x5411


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    with Listener.tcp() as listener:
        # Inherited by what it accepts: a backend that takes little at a time.
        listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        yield listener


@pytest.fixture(scope="module")
def instance(serve_all: Serve, listener: Listener) -> Instance:
    return serve_all(listener.address)


@pytest.fixture(scope="module")
def impatient(serve_all: Serve, listener: Listener) -> Instance:
    """With little time for those who do not take the last octets."""
    return serve_all(listener.address, limits={"half_closed_timeout": "100ms"})


@pytest.fixture
def pair(instance: Instance, listener: Listener) -> Iterator[Pair]:
    yield from connected(instance, listener, SSL.TLS1_3_VERSION)


def unacknowledged(side: socket.socket) -> int:
    """What this side sent that is not in the other one's kernel yet, in octets."""
    octets: int = struct.unpack("=i", fcntl.ioctl(side.fileno(), SIOCOUTQ, bytes(4)))[0]
    return octets


def receive_slowly(client: TlsClient, length: int) -> bytes:
    octets = bytearray()
    while len(octets) < length:
        octets += client.receive(min(16384, length - len(octets)))
        time.sleep(0.002)
    return bytes(octets)


# --- a backend's reset ------------------------------------------------------------------


@pytest.mark.parametrize("size", [100_000, 400_000])
def test_an_answer_arrives_whose_backend_left_the_request_unread(
    instance: Instance, listener: Listener, size: int
) -> None:
    """A close with octets unread is a reset (RFC 2525 §2.17)."""
    with TlsClient(instance.port, receive_buffer=8192) as client:
        client.handshake()
        backend = listener.accept()
        client.send(b"POST / HTTP/1.1\r\n" + MUCH[:10_000])
        receive_exactly(backend, 10)
        backend.sendall(MUCH[:size])
        eventually(lambda: not unacknowledged(backend), "all is with the worker")
        backend.close()
        assert receive_slowly(client, size) == MUCH[:size]
        with pytest.raises(ConnectionResetError):
            client.receive()
        assert end_of(Pair(instance, client, backend)) == "backend_reset"


def test_an_answer_reaches_a_client_that_reads_once_it_has_written(
    instance: Instance, listener: Listener
) -> None:
    """What such a client still writes is taken, for nobody: it would never read otherwise."""
    with TlsClient(instance.port, receive_buffer=8192) as client:
        client.handshake()
        backend = listener.accept()
        backend.sendall(MUCH[:400_000])
        eventually(lambda: not unacknowledged(backend), "all is with the worker")
        reset(backend)
        client.send(MUCH)
        assert client.receive_exactly(400_000) == MUCH[:400_000]


def test_a_backend_that_closed_before_it_was_written_to_has_ended_cleanly(pair: Pair) -> None:
    """Its FIN comes first, and the RST only for what it gets afterwards."""
    pair.backend.sendall(b"413 Content Too Large")
    pair.backend.close()
    pair.client.send(MUCH[:1000])
    assert pair.client.receive_all() == b"413 Content Too Large"


# --- a client's truncation, and its reset -------------------------------------------------


def test_a_truncated_request_arrives_before_the_reset(pair: Pair) -> None:
    def write_and_leave() -> None:
        pair.client.send(MUCH[:2_000_000])
        pair.client.socket.shutdown(socket.SHUT_WR)

    writer = threading.Thread(target=write_and_leave)
    writer.start()
    octets = bytearray()
    while len(octets) < 2_000_000:
        octets += pair.backend.recv(8192)
        time.sleep(0.001)
    assert octets == MUCH[:2_000_000]
    writer.join()
    assert was_reset(pair.backend)
    assert end_of(pair) == "client_truncated"


def test_an_answer_arrives_whose_client_had_truncated_its_stream(
    instance: Instance, listener: Listener
) -> None:
    """It still reads: what the backend had sent by then is delivered, and a reset follows."""
    with TlsClient(instance.port, receive_buffer=8192) as client:
        client.handshake()
        with listener.accept() as backend:
            backend.sendall(MUCH[:400_000])
            eventually(lambda: not unacknowledged(backend), "all is with the worker")
            client.socket.shutdown(socket.SHUT_WR)
            assert receive_slowly(client, 400_000) == MUCH[:400_000]
            with pytest.raises(ConnectionResetError):
                client.receive()
            assert was_reset(backend)


def test_a_truncated_request_reaches_a_backend_that_reads_once_it_has_written(
    instance: Instance, listener: Listener
) -> None:
    """Most of what it writes is for nobody, and is taken: it would never read otherwise."""

    def read() -> None:
        with suppress(ConnectionResetError):
            while client.receive():
                pass

    with TlsClient(instance.port) as client:
        client.handshake()
        with listener.accept() as backend:
            client.send(MUCH[:400_000])
            eventually(lambda: not unacknowledged(client.socket), "all is with the worker")
            client.socket.shutdown(socket.SHUT_WR)
            # What had come by the time of its end is for the client.
            reader = threading.Thread(target=read)
            reader.start()
            backend.sendall(MUCH)
            assert receive_exactly(backend, 400_000) == MUCH[:400_000]
            assert was_reset(backend)
            reader.join()


def test_a_truncated_stream_may_be_a_clean_end(serve: Serve, backend: Listener) -> None:
    instance = serve(vhost=[{"backend": backend.address, "truncated": "end"}])
    with TlsClient(instance.port) as client:
        client.handshake()
        with backend.accept() as accepted:
            client.send(b"question")
            client.socket.shutdown(socket.SHUT_WR)
            assert receive_all(accepted) == b"question"
            accepted.sendall(b"answer")
            accepted.shutdown(socket.SHUT_WR)
            assert client.receive_all() == b"answer"
            pair = Pair(instance, client, accepted)
            event = ended(pair)
            assert event["end"] == "clean"
            assert event["detail"] == "the client sent no close_notify"


def test_a_reset_is_no_clean_end_where_truncation_is(serve: Serve, backend: Listener) -> None:
    instance = serve(vhost=[{"backend": backend.address, "truncated": "end"}])
    client = TlsClient(instance.port).handshake()
    with backend.accept() as accepted:
        client.send(b"half a requ")
        client.reset()
        with pytest.raises(ConnectionResetError):
            receive_all(accepted)


@pytest.mark.parametrize("size", [1, 400_000])
def test_what_a_client_sent_before_its_reset_arrives(
    instance: Instance, listener: Listener, size: int
) -> None:
    client = TlsClient(instance.port).handshake()
    with listener.accept() as backend:
        client.send(MUCH[:size])
        eventually(lambda: not unacknowledged(client.socket), "all is with the worker")
        client.reset()
        assert receive_exactly(backend, size) == MUCH[:size]
        assert was_reset(backend)


def test_a_request_with_its_end_arrives_before_its_clients_reset(pair: Pair) -> None:
    pair.client.send(MUCH[:400_000])
    pair.client.close_notify()
    eventually(lambda: not unacknowledged(pair.client.socket), "all is with the worker")
    name = pair.client.socket.getsockname()
    pair.client.reset()
    assert receive_all(pair.backend) == MUCH[:400_000]
    event = pair.instance.wait_for_event("connection_ended", client=f"{name[0]}:{name[1]}")
    assert event["end"] == "client_reset"


def test_the_last_request_arrives_while_its_clients_socket_takes_no_answer(pair: Pair) -> None:
    """Both have come before the worker looks: what it passes on first must cost nothing."""
    worker = the_busy_worker(pair.instance, pair.client.name)
    worker.kill(signal.SIGSTOP)
    pair.client.send(MUCH[:1000])
    pair.client.close_notify()
    pair.client.socket.close()
    # Several records: the first one's answer is a reset, and the second one cannot be written.
    pair.backend.sendall(MUCH[:200_000])
    worker.kill(signal.SIGCONT)
    assert receive_exactly(pair.backend, 1000) == MUCH[:1000]


# --- a peer that does not read ------------------------------------------------------------


def test_a_backend_that_does_not_read_is_reset_in_the_end(
    impatient: Instance, listener: Listener
) -> None:
    client = TlsClient(impatient.port).handshake()
    with listener.accept():
        client.send(MUCH[:400_000])
        eventually(lambda: not unacknowledged(client.socket), "all is with the worker")
        client.reset()
        event = impatient.wait_for_event("connection_ended", client=client.name)
    assert event["end"] == "client_reset"
    assert event["detail"].endswith(" octets not taken in 0.1 s")


# --- alerts -----------------------------------------------------------------------------


def test_an_alert_reaches_a_client_that_is_still_writing(pair: Pair) -> None:
    pair.client.send(b"so far so good")
    pair.client.socket.sendall(b"\x17\x03\x03\x00\x20" + b"not what the key would make of it"[:32])
    pair.client.socket.sendall(MUCH[: 4 << 20])
    time.sleep(0.1)
    pair.client.socket.sendall(MUCH[:1000])
    with pytest.raises(SSL.Error, match="bad record mac"):
        pair.client.receive()
    assert receive_exactly(pair.backend, 14) == b"so far so good"
    assert was_reset(pair.backend)
    assert end_of(pair) == "client_protocol_error"


# --- half-closed ------------------------------------------------------------------------


def test_a_close_notify_is_followed_by_a_fin(pair: Pair) -> None:
    pair.backend.shutdown(socket.SHUT_WR)
    assert pair.client.receive_all() == b""
    assert pair.client.socket.recv(1) == b""


def test_clients_that_keep_their_sockets_after_the_end_keep_nobody_out(
    serve: Serve, backend: Listener
) -> None:
    instance = serve(
        backend.address,
        worker={"max": 5, "spare": 1},
        limits={"half_closed_timeout": "1s", "handshakes": 5},
    )
    with ExitStack() as stack:
        for _ in range(5):
            client = stack.enter_context(TlsClient(instance.port)).handshake()
            backend.accept().close()
            assert client.receive_all() == b""
        sixth = stack.enter_context(TlsClient(instance.port)).handshake()
        with backend.accept() as accepted:
            sixth.send(b"at last")
            assert receive_exactly(accepted, 7) == b"at last"
    assert instance.wait_for_event("connection_ended")["end"] == "half_closed"


def test_what_goes_on_in_the_other_direction_keeps_a_half_closed_connection(
    serve: Serve, backend: Listener
) -> None:
    instance = serve(backend.address, limits={"half_closed_timeout": "3s"})
    with TlsClient(instance.port) as client:
        client.handshake()
        with backend.accept() as accepted:
            accepted.shutdown(socket.SHUT_WR)
            assert client.receive_all() == b""
            for _ in range(8):
                client.send(b"x")
                assert receive_exactly(accepted, 1) == b"x"
                time.sleep(0.5)
            client.close_notify()
            assert receive_all(accepted) == b""


def test_a_slow_backend_gets_what_a_half_closed_client_has_sent(
    serve: Serve, listener: Listener
) -> None:
    """The last of it is in our kernel, with nothing left for the worker to do, for long.

    That takes longer than a worker may stay whose client has left, and nothing goes on.
    """
    instance = serve(listener.address, limits={"half_closed_timeout": "2s"})
    with TlsClient(instance.port) as client:
        client.handshake()
        with listener.accept() as backend:

            def write_and_end() -> None:
                client.send(MUCH[:1_000_000])
                client.close_notify()
                client.socket.shutdown(socket.SHUT_WR)

            writer = threading.Thread(target=write_and_end)
            writer.start()
            octets = bytearray()
            while received := backend.recv(8192):
                octets += received
                time.sleep(0.03)
            assert octets == MUCH[:1_000_000]
            writer.join()


def is_reset_although_it_reads(side: socket.socket, octets: int) -> bool:
    """Whether the connection ends in a reset while so many octets are read at a time."""
    with suppress(ConnectionResetError):
        while side.recv(octets):
            time.sleep(0.02)
        return False
    return True


def test_a_client_that_takes_the_last_octets_one_by_one_is_reset_in_the_end(
    impatient: Instance, listener: Listener
) -> None:
    """It would hold its place for as many times the timeout as there are octets for it."""
    with TlsClient(impatient.port, receive_buffer=8192) as client:
        client.handshake()
        with listener.accept() as accepted:
            accepted.sendall(MUCH[:1_000_000])
        assert is_reset_although_it_reads(client.socket, 4096)
        event = impatient.wait_for_event("connection_ended", client=client.name)
        assert event["end"] == "half_closed"


def test_a_backend_that_takes_them_one_by_one_is_reset_in_the_end_too(
    impatient: Instance, listener: Listener
) -> None:
    client = TlsClient(impatient.port).handshake()
    with listener.accept() as backend:
        client.send(MUCH[:400_000])
        eventually(lambda: not unacknowledged(client.socket), "all is with the worker")
        client.reset()
        assert is_reset_although_it_reads(backend, 2048)
        event = impatient.wait_for_event("connection_ended", client=client.name)
        assert " octets not taken in " in event["detail"]


def test_the_handshake_of_a_client_that_only_ends_is_one_that_it_left(instance: Instance) -> None:
    with connect(instance.port) as client:
        hello = TlsClient(instance.port)
        client.sendall(hello.first_flight())
        hello.socket.close()
        client.recv(65536)
        client.shutdown(socket.SHUT_WR)
        name = client.getsockname()
        event = instance.wait_for_event("handshake_failed", client=f"{name[0]}:{name[1]}")
    assert (event["end"], event["detail"]) == ("client_left", "within the handshake")
