"""Clients that are broken, slow, gone or hostile: their own connection alone ends."""

import random
import select
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
from conftest import Rounds
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from OpenSSL import SSL

from titus_py.worker.client_hello import MAX_RECORDS

from .conftest import Certificates, Serve
from .instance import Event, Instance, eventually, free_port
from .peers import (
    Listener,
    TlsClient,
    Truncated,
    alert_in,
    connect,
    echo,
    receive_all,
    reset,
    served_by,
)
from .service import launcher

UNEXPECTED_MESSAGE, BAD_RECORD_MAC, RECORD_OVERFLOW, HANDSHAKE_FAILURE = 10, 20, 22, 40
ILLEGAL_PARAMETER, DECODE_ERROR, UNRECOGNIZED_NAME = 47, 50, 112


@pytest.fixture(scope="module")
def instance(serve_all: Serve, echoing: Listener) -> Instance:
    return serve_all(echoing.address, vhost=[{"sni": ["localhost", ""]}])


def client_hello(server_name: str | None = "localhost", ciphers: str | None = None) -> bytes:
    """A real one, in one record."""
    unused, also_unused = socket.socketpair()
    with unused, also_unused:
        newest = SSL.TLS1_2_VERSION if ciphers else SSL.TLS1_3_VERSION
        versions = SSL.TLS1_2_VERSION, newest
        client = TlsClient(0, server_name, source=unused, ciphers=ciphers, versions=versions)
        return client.first_flight()


def answer_to(instance: Instance, *pieces: bytes) -> tuple[bytes, Event]:
    """What the proxy answers to these octets, until it closes, and what it logs."""
    earlier = len(instance.events())
    with connect(instance.port) as client:
        name, port = client.getsockname()
        for piece in pieces:
            client.sendall(piece)
        answer = b""
        while octets := client.recv(65536):
            answer += octets
    return answer, instance.wait_for_event(
        "handshake_failed", since=earlier, client=f"{name}:{port}"
    )


def record(content: bytes, kind: int = 22, version: int = 1) -> bytes:
    return bytes((kind, 3, version)) + len(content).to_bytes(2, "big") + content


def still_serves(instance: Instance) -> bool:
    with TlsClient(instance.port) as client:
        client.handshake()
        client.send(b"ping")
        return client.receive_exactly(4) == b"ping"


# --- not TLS ---------------------------------------------------------------------------


@pytest.mark.parametrize("octets", [b"\0" * 100, b"SSH-2.0-OpenSSH_9.2\r\n", b"\x80\x2e\1\0\2"])
def test_garbage_gets_an_alert(instance: Instance, octets: bytes) -> None:
    answer, event = answer_to(instance, octets)
    assert alert_in(answer) == UNEXPECTED_MESSAGE
    assert (event["end"], event["detail"]) == ("not_tls", "not TLS")


@pytest.mark.parametrize("method", [b"GET", b"POST", b"OPTIONS"])
def test_a_plain_http_request_is_answered_as_one(instance: Instance, method: bytes) -> None:
    answer, event = answer_to(instance, method + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"HTTPS" in answer
    assert (event["end"], event["detail"]) == ("plain_http", "a plain HTTP request")


def test_a_plain_http_request_that_comes_an_octet_at_a_time_is_told_too(
    instance: Instance,
) -> None:
    answer, event = answer_to(instance, *[bytes((octet,)) for octet in b"GET / HTTP"])
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert event["end"] == "plain_http"


# --- a ClientHello unlike others -------------------------------------------------------


def test_a_client_hello_longer_than_any_can_be_gets_an_alert(instance: Instance) -> None:
    answer, event = answer_to(instance, record(b"\1" + (131_397).to_bytes(3, "big")))
    assert alert_in(answer) == ILLEGAL_PARAMETER
    assert event["end"] == "bad_client_hello"
    assert "131397 octets" in event["detail"]


def test_a_record_longer_than_one_may_be_gets_record_overflow(instance: Instance) -> None:
    answer, event = answer_to(instance, record(b"\1" + bytes(16384)))
    assert alert_in(answer) == RECORD_OVERFLOW
    assert event["end"] == "bad_client_hello"


def test_a_client_hello_that_contradicts_itself_gets_an_alert(instance: Instance) -> None:
    answer, event = answer_to(instance, record(b"\1\0\0\x28\3\3" + bytes(32) + b"\xff" * 6))
    assert alert_in(answer) == DECODE_ERROR
    assert event["end"] == "bad_client_hello"


def test_an_empty_record_gets_an_alert(instance: Instance) -> None:
    answer, event = answer_to(instance, record(b""))
    assert alert_in(answer) == DECODE_ERROR
    assert event["end"] == "bad_client_hello"


@pytest.mark.parametrize("size", [4, 5, 64, 500])
def test_a_client_hello_in_many_records_is_read(instance: Instance, size: int) -> None:
    with TlsClient(instance.port) as client:
        hello = client.first_flight()[5:]
        pieces = [hello[start : start + size] for start in range(0, len(hello), size)]
        client.socket.sendall(b"".join(map(record, pieces)))
        client.handshake()
        client.send(b"ping")
        assert client.receive_exactly(4) == b"ping"


def test_a_client_hello_in_too_many_records_gets_an_alert(instance: Instance) -> None:
    with TlsClient(instance.port) as client:
        hello = client.first_flight()[5:]
    assert len(hello) > MAX_RECORDS
    answer, event = answer_to(instance, b"".join(record(bytes([octet])) for octet in hello))
    assert alert_in(answer) == UNEXPECTED_MESSAGE
    assert event["detail"] == f"a ClientHello in more than {MAX_RECORDS} records"


@pytest.fixture(scope="module")
def narrow(
    serve_all: Serve, echoing: Listener, tmp_path_factory: pytest.TempPathFactory
) -> Instance:
    """Its clients' octets have next to no room in the kernel."""
    port = free_port()
    program = launcher(tmp_path_factory.mktemp("narrow"), ("127.0.0.1", port), receive_buffer=4096)
    with mock.patch("integration.instance.TITUS_PY", program):
        return serve_all(echoing.address, listen=[{"address": f"127.0.0.1:{port}"}])


@pytest.mark.parametrize("which", ["instance", "narrow"])
@pytest.mark.parametrize("names", [0, 55, 240])
def test_a_client_hello_in_segments_of_one_octet_is_read(
    which: str, names: int, request: pytest.FixtureRequest
) -> None:
    """Also where not all of it has room, and where poll(2), for that, wakes without any news."""
    instance: Instance = request.getfixturevalue(which)
    with TlsClient(instance.port) as client:
        if names:
            client.tls.set_alpn_protos([b"%0250d" % number for number in range(names)])
        hello = client.first_flight()
        assert len(hello) > names * 251
        for octet in hello:
            client.socket.sendall(bytes((octet,)))
        client.handshake()
        client.send(b"ping")
        assert client.receive_exactly(4) == b"ping"


def test_a_server_name_that_is_no_name_gets_an_alert(instance: Instance) -> None:
    hello = client_hello("localhost")
    at = hello.index(b"localhost")
    for bad in (b"local\0ost", b"local\xffost", b"local\nost"):
        answer, event = answer_to(instance, hello[:at] + bad + hello[at + 9 :])
        assert alert_in(answer) == ILLEGAL_PARAMETER
        assert event["end"] == "bad_client_hello"


def test_a_name_that_nobody_serves_gets_unrecognized_name(instance: Instance) -> None:
    answer, event = answer_to(instance, client_hello("elsewhere.example"))
    assert alert_in(answer) == UNRECOGNIZED_NAME
    assert (event["end"], event["server_name"]) == ("no_virtual_host", "elsewhere.example")


def test_a_client_without_any_common_suite_gets_handshake_failure(instance: Instance) -> None:
    answer, event = answer_to(instance, client_hello(ciphers="AES128-SHA@SECLEVEL=0"))
    assert alert_in(answer) == HANDSHAKE_FAILURE
    assert (event["end"], event["detail"]) == ("handshake_failed", "no shared cipher")


def test_a_message_out_of_turn_gets_an_alert(instance: Instance) -> None:
    answer, event = answer_to(instance, record(b"\2" + bytes(3)))
    assert alert_in(answer) == UNEXPECTED_MESSAGE
    assert event["end"] == "not_tls"


def test_rubbish_after_the_client_hello_ends_the_handshake(instance: Instance) -> None:
    answer, event = answer_to(instance, client_hello(), record(b"\x16" * 64, kind=23))
    assert answer[0] == 22
    assert event["end"] == "handshake_failed"
    assert event["detail"]


# --- slow ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient(serve_all: Serve, echoing: Listener) -> Instance:
    return serve_all(echoing.address, worker={"handshake_timeout": "1500ms"})


def wait_for_the_end_of(client: socket.socket) -> None:
    """Until the proxy ends this connection."""
    try:
        while client.recv(65536):
            pass
    except ConnectionResetError:
        pass


def test_silence_ends_with_the_handshake_timeout(impatient: Instance) -> None:
    earlier, started = len(impatient.events()), time.monotonic()
    with connect(impatient.port) as client:
        wait_for_the_end_of(client)
        assert 1.0 < time.monotonic() - started < 30.0
        host, port = client.getsockname()
    event = impatient.wait_for_event("handshake_failed", since=earlier, client=f"{host}:{port}")
    assert event["end"] == "handshake_timeout"


@pytest.mark.parametrize("point", ["a part of the ClientHello", "the ClientHello"])
def test_silence_after_a_beginning_ends_with_the_handshake_timeout(
    impatient: Instance, point: str
) -> None:
    hello = client_hello()
    earlier, started = len(impatient.events()), time.monotonic()
    with connect(impatient.port) as client:
        client.sendall(hello if point == "the ClientHello" else hello[:100])
        wait_for_the_end_of(client)
        assert 1.0 < time.monotonic() - started < 30.0
        host, port = client.getsockname()
    event = impatient.wait_for_event("handshake_failed", since=earlier, client=f"{host}:{port}")
    assert event["end"] == "handshake_timeout"


def dribble(client: socket.socket, octets: bytes) -> None:
    for octet in octets:
        client.sendall(bytes((octet,)))
        time.sleep(0.25)


def test_an_octet_now_and_then_ends_with_the_handshake_timeout(impatient: Instance) -> None:
    earlier = len(impatient.events())
    with connect(impatient.port) as client:
        host, port = client.getsockname()
        started = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            dribble(client, client_hello())
        assert time.monotonic() - started < 30.0, "all of it would take minutes"
    event = impatient.wait_for_event("handshake_failed", since=earlier, client=f"{host}:{port}")
    assert event["end"] == "handshake_timeout"


def test_workers_that_have_to_be_ended_after_their_time_are_worth_a_warning(
    serve: Serve, echoing: Listener
) -> None:
    """Each after its own: the second one begins while the first has its time."""
    instance = serve(echoing.address, worker={"handshake_timeout": "1500ms"})
    # Before they have a client: from then on, a busy machine may take as long as they have.
    for spare in instance.confined_workers(4):
        spare.kill(signal.SIGSTOP)
    with connect(instance.port) as first, connect(instance.port) as second:
        names = []
        for client in (first, second):
            client.sendall(client_hello("localhost"))
            host, port = client.getsockname()
            names.append(f"{host}:{port}")
            instance.wait_for_event("connection_begun", client=names[-1])
        for client in (first, second):
            wait_for_the_end_of(client)
    for name in names:
        event = instance.wait_for_event("handshake_failed", client=name)
        assert event["end"] == "did not keep to its handshake timeout"
        assert event["level"] == "warning"


# --- gone ------------------------------------------------------------------------------


def leave_before_saying_anything(client: TlsClient) -> None:
    pass


def leave_within_the_client_hello(client: TlsClient) -> None:
    client.socket.sendall(client.first_flight()[:50])


def leave_after_the_client_hello(client: TlsClient) -> None:
    client.socket.sendall(client.first_flight())


def leave_after_the_servers_flight(client: TlsClient) -> None:
    client.socket.sendall(client.first_flight())
    client.socket.recv(65536)


def leave_within_a_record(client: TlsClient) -> None:
    client.socket.sendall(client.first_flight())
    client.socket.recv(65536)
    client.socket.sendall(b"\x17\x03\x03\x01\x00" + bytes(40))


POINTS = [
    leave_before_saying_anything,
    leave_within_the_client_hello,
    leave_after_the_client_hello,
    leave_after_the_servers_flight,
    leave_within_a_record,
]


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("point", POINTS)
def test_a_client_may_leave_at_any_point_of_the_handshake(
    instance: Instance, point: Callable[[TlsClient], None], how: str
) -> None:
    earlier = len(instance.events())
    client = TlsClient(instance.port)
    host, port = client.socket.getsockname()
    point(client)
    if how == "RST":
        reset(client.socket)
    else:
        client.socket.close()
    event = instance.wait_for_event("handshake_failed", since=earlier, client=f"{host}:{port}")
    # In TLS 1.3 a client that is gone is noticed when it is written to, at the latest.
    assert event["end"] == "client_left"


def test_a_client_may_leave_right_after_its_last_handshake_message(instance: Instance) -> None:
    earlier = len(instance.events())
    for leave in (reset, socket.socket.close):
        client = TlsClient(instance.port).handshake()
        host, port = client.socket.getsockname()
        leave(client.socket)
        event = instance.wait_for_event("connection_ended", since=earlier, client=f"{host}:{port}")
        assert event["end"] in ("client_reset", "client_truncated")


def test_a_client_that_refuses_the_certificate_is_named_as_such(instance: Instance) -> None:
    earlier = len(instance.events())
    with TlsClient(instance.port) as client:
        # It trusts nobody.
        client.tls.set_verify(SSL.VERIFY_PEER)
        host, port = client.socket.getsockname()
        with pytest.raises(SSL.Error):
            client.handshake()
        client._flush()
        event = instance.wait_for_event("handshake_failed", since=earlier, client=f"{host}:{port}")
    assert event["end"] == "handshake_failed"
    assert "unknown ca" in event["detail"]


# --- all of it, many times -------------------------------------------------------------


@pytest.mark.timeout(600)  # all of them: three quarters of a minute, where nothing else runs
def test_after_thousands_of_these_everything_is_as_before(
    serve: Serve, echoing: Listener, rounds: Rounds
) -> None:
    """A hundred of each kind: what one in fifty leaves behind is seen in the counts."""
    instance = serve(echoing.address, vhost=[{"sni": ["localhost"]}], worker={"max": 64})
    assert still_serves(instance)
    before = instance.settled_counts()
    hello, unknown, suiteless = (
        client_hello(),
        client_hello("elsewhere.example"),
        client_hello(ciphers="AES128-SHA@SECLEVEL=0"),
    )
    kinds = {
        "not_tls": [bytes(range(200)), record(b"\2" + bytes(3))],
        "plain_http": [b"GET / HTTP/1.1\r\n\r\n"],
        "bad_client_hello": [record(b"\1\3\0\0" + bytes(100)), record(b"")],
        "no_virtual_host": [unknown],
        "handshake_failed": [suiteless],
        "client_left": [b"", hello[:3], hello[:200], hello[:-1], hello],
    }
    choices = [(end, octets) for end, variants in kinds.items() for octets in variants]
    count = rounds(enough=500, full=10_000)
    done: Counter[str] = Counter()
    lock = threading.Lock()

    def misbehave(number: int) -> None:
        end, octets = choices[number % len(choices)]
        try:
            with connect(instance.port) as client:
                client.sendall(octets)
                if end != "client_left":
                    client.recv(7)
                elif number % 2:
                    reset(client)
        except ConnectionResetError:
            pass
        with lock:
            done[end] += 1

    with ThreadPoolExecutor(24) as pool:
        for _ in pool.map(misbehave, random.Random(1).sample(range(count), count)):
            pass
    assert done.total() == count

    def ends() -> Counter[str]:
        found = Counter(event["end"] for event in instance.events_named("handshake_failed"))
        for event in instance.events_named("silent_clients"):
            found[event["end"]] += event["count"]
        return found

    eventually(lambda: ends().total() >= count, "the end of each", 60)
    assert ends() == done
    assert instance.settled_counts() == before
    assert still_serves(instance)


def test_others_are_served_meanwhile(serve: Serve) -> None:
    with Listener.tcp() as listener, served_by(listener, echo):
        instance = serve(listener.address)
        silent = [connect(instance.port) for _ in range(50)]
        try:
            assert still_serves(instance)
            # None of them had to end for it.
            assert not select.select(silent, [], [], 0)[0]
        finally:
            for client in silent:
                client.close()


def test_a_handshake_that_is_cut_off_is_an_error_to_the_client() -> None:
    """The control: TlsClient does not take a FIN for an answer."""
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises((Truncated, BrokenPipeError)):
        TlsClient(0, source=ours).handshake()


# --- the RSA key exchange --------------------------------------------------------------


@pytest.fixture(scope="module")
def rsa_key_exchange(
    serve_all: Serve, certificates: Certificates, echoing: Listener
) -> tuple[Instance, rsa.RSAPublicKey]:
    issued = certificates("RSA-2048")
    key = x509.load_pem_x509_certificate(issued.certificate.read_bytes()).public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    vhost = {"certificate": issued.certificate, "key": issued.key, "rsa_key_exchange": True}
    return serve_all(echoing.address, vhost=[vhost]), key


def answer_to_secret(instance: Instance, ciphertext: bytes) -> tuple[int | None, str]:
    """The alert, and what is logged, where a client sends this as its premaster secret."""
    earlier = len(instance.events())
    exchange = len(ciphertext).to_bytes(2, "big") + ciphertext
    message = b"\x10" + len(exchange).to_bytes(3, "big") + exchange
    with connect(instance.port) as client:
        name, port = client.getsockname()
        client.sendall(client_hello(ciphers="AES128-GCM-SHA256"))
        answer = b""
        while not answer.endswith(b"\x0e\0\0\0"):  # ServerHelloDone
            answer += client.recv(65536)
        # ChangeCipherSpec, and what would be a Finished.
        flight = (message, 22), (b"\1", 20), (bytes(40), 22)
        client.sendall(b"".join(record(*part, version=3) for part in flight))
        alert = alert_in(receive_all(client))
    event = instance.wait_for_event("handshake_failed", since=earlier, client=f"{name}:{port}")
    return alert, event["detail"]


def test_whatever_is_wrong_with_a_premaster_secret_only_the_finished_says_so(
    rsa_key_exchange: tuple[Instance, rsa.RSAPublicKey],
) -> None:
    """RFC 5246 §7.4.7.1, also of the length: and it is no alarm, anybody can send it."""
    instance, key = rsa_key_exchange
    good = key.encrypt(b"\3\3" + bytes(46), padding.PKCS1v15())
    bad = [bytes(length) for length in (0, 1, 48, 255, 256, 257, 1024, 1025, 2046)]
    bad += [good[1:], good + b"\0", b"\0" + good, b"\xff" * 256]
    expected = answer_to_secret(instance, good)
    assert expected[0] == BAD_RECORD_MAC
    for ciphertext in bad:
        assert answer_to_secret(instance, ciphertext) == expected, len(ciphertext)
