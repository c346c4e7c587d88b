"""Clients that come through a load balancer: ``accept_proxy_from``."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from proxyprotocol.v2 import ProxyProtocolV2

from titus_py.audit.probe import Probe, Unanswered
from titus_py.audit.target import find_target

from .conftest import Certificates, Nginx, Serve
from .hellos import client_hello, records
from .instance import Event, Instance, eventually, fits, free_port
from .peers import (
    Listener,
    TlsClient,
    connect,
    echo,
    receive_exactly,
    served_by,
    was_reset,
)
from .proxy_peers import haproxy_in_front
from .service import FAILS, edit, reload, status, talk

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LINE = b"PROXY TCP4 192.0.2.1 203.0.113.2 56324 443\r\n"
LINE6 = b"PROXY TCP6 2001:db8::1 2001:db8::2 56324 443\r\n"
MAPPED = b"PROXY TCP6 ::ffff:192.0.2.1 ::1 56324 443\r\n"
BINARY = SIGNATURE + b"\x21\x11\0\x13\xc0\0\2\1\xcb\0\x71\2\xdc\4\1\xbb\xe0\0\4abcd"
LOCAL = SIGNATURE + b"\x20\0\0\0"
UNKNOWN = b"PROXY UNKNOWN\r\n"
HELLO = records(client_hello())


def behind(*networks: str, **more: Any) -> list[dict[str, Any]]:
    """A listener for load balancers."""
    address = f"127.0.0.1:{free_port()}"
    return [{"address": address, "accept_proxy_from": networks or ["127.0.0.0/8"], **more}]


class CountingListener(Listener):
    """Echoes, and knows how many connections it had."""

    connections = 0

    def accept(self) -> socket.socket:
        connection = super().accept()
        self.connections += 1
        return connection


@pytest.fixture(scope="module")
def counting() -> Iterator[CountingListener]:
    listening = socket.create_server(("127.0.0.1", 0))
    address = "{}:{}".format(*listening.getsockname())
    with CountingListener(listening, address) as listener, served_by(listener, echo):
        yield listener


@pytest.fixture(scope="module")
def hasty() -> int:
    """The port of the same instance's listener that has little patience with load balancers."""
    return free_port()


@pytest.fixture(scope="module")
def proxied(serve_all: Serve, counting: CountingListener, hasty: int) -> Instance:
    listen = behind(proxy_timeout="60s") + behind(proxy_timeout="3s")
    listen[1]["address"] = f"127.0.0.1:{hasty}"
    return serve_all(counting.address, listen=listen)


def name_of(side: socket.socket) -> str:
    return "{}:{}".format(*side.getsockname())


def said_of(instance: Instance, count: int, **fields: object) -> list[Event]:
    """Everything that was said of the last connection with these, once that is so much."""

    def found() -> list[Event]:
        fitting = [event for event in instance.events() if fits(event, fields)]
        number = fitting[-1]["connection"] if fitting else None
        events = [event for event in instance.events() if event.get("connection", -1) == number]
        return events if len(events) >= count else []

    events: list[Event] = eventually(found, f"{count} events of {fields}\n{instance.log()}")
    return events


@pytest.mark.parametrize(
    ("header", "client"),
    [
        (LINE, "192.0.2.1:56324"),
        (LINE6, "[2001:db8::1]:56324"),
        (MAPPED, "192.0.2.1:56324"),
        (BINARY, "192.0.2.1:56324"),
        (LOCAL, None),
        (UNKNOWN, None),
    ],
    ids=["line", "line-6", "line-mapped", "binary", "local", "unknown"],
)
@pytest.mark.parametrize("how", ["at once", "apart", "by octets"])
def test_the_client_is_who_the_header_says(
    proxied: Instance, header: bytes, client: str | None, how: str
) -> None:
    """With the ClientHello in one segment, before it, or octet by octet."""
    with TlsClient(proxied.port) as tls:
        hello = tls.first_flight()
        if how == "at once":
            tls.socket.sendall(header + hello)
        elif how == "apart":
            tls.socket.sendall(header[:9])
            time.sleep(0.02)
            tls.socket.sendall(header[9:])
            time.sleep(0.02)
            tls.socket.sendall(hello)
        else:
            for octet in header:
                tls.socket.sendall(bytes((octet,)))
            tls.socket.sendall(hello)
        assert talk(tls.handshake())
        tls.close_notify()
        tls.receive_all()
        balancer = name_of(tls.socket)
    if client is None:
        events = said_of(proxied, 2, client=balancer)
        assert not any("balancer" in event for event in events)
    else:
        events = said_of(proxied, 2, balancer=balancer)
        assert {event["balancer"] for event in events} == {balancer}
        assert {event["client"] for event in events} == {client}
    begun, ended = events
    assert (begun["event"], ended["event"]) == ("connection_begun", "connection_ended")
    assert ended["end"] == "clean"
    assert ended["local"] == f"127.0.0.1:{proxied.port}"


@pytest.mark.parametrize(
    ("octets", "end", "detail"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "bad_proxy_header", "no PROXY header"),
        (b"PROXY UNKNOWN " + bytes(100), "bad_proxy_header", "a line of more than 107 octets"),
        # Only lengths are looked at before the client has said something.
        (b"PROXY TCP4 1.2.3 1.2.3.4 1 1\r\n" + HELLO, "bad_proxy_header",
         "a line with a malformed address"),
        (SIGNATURE + b"\x21\x11\0\x13" + bytes(12) + b"\3\0\4abcd" + HELLO, "bad_proxy_header",
         "a wrong checksum (CRC32C)"),
        (LINE[:20], "proxy_timeout", None),
    ],
    ids=["http", "too-long", "malformed", "checksum", "half"],
)  # fmt: skip
def test_what_is_no_header_ends_that_connection_and_reaches_no_backend(
    proxied: Instance,
    hasty: int,
    counting: CountingListener,
    octets: bytes,
    end: str,
    detail: str | None,
) -> None:
    before = counting.connections
    with connect(hasty if end == "proxy_timeout" else proxied.port) as side:
        side.sendall(octets)
        assert was_reset(side)
        # Who has not said all of it has no worker, and so no event at its beginning.
        events = 1 if end == "proxy_timeout" else 2
        ended = said_of(proxied, events, client=name_of(side))[-1]
    assert ended["event"] == "handshake_failed"
    assert (ended["end"], ended.get("detail")) == (end, detail)
    assert counting.connections == before
    with TlsClient(proxied.port) as tls:
        tls.socket.sendall(LINE)
        assert talk(tls.handshake())


def test_a_header_octet_by_octet_has_so_much_time_and_no_more(
    proxied: Instance, hasty: int
) -> None:
    """However many octets come within it."""
    header = SIGNATURE + b"\x21\x11\xff\xff" + bytes(65535)
    with connect(hasty) as side:
        with suppress(ConnectionResetError, BrokenPipeError):
            for octet in header:
                side.sendall(bytes((octet,)))
                time.sleep(0.01)
            pytest.fail("all of it was taken")
        ended = said_of(proxied, 1, client=name_of(side))[-1]
    assert ended["end"] == "proxy_timeout"


def test_a_client_without_a_balancer_is_told_apart_in_the_log(proxied: Instance) -> None:
    with TlsClient(proxied.port) as tls:
        with pytest.raises(FAILS):
            tls.handshake()
        ended = said_of(proxied, 2, client=name_of(tls.socket))[-1]
    assert (ended["end"], ended["detail"]) == ("bad_proxy_header", "TLS without a PROXY header")


@pytest.mark.parametrize(("said", "detail"), [(b"", None), (b"P", "before the PROXY header")])
def test_who_hangs_up_before_the_header_is_a_health_check(
    proxied: Instance, said: bytes, detail: str | None
) -> None:
    with connect(proxied.port) as side:
        name = name_of(side)
        side.sendall(said)
    # Who says nothing has no worker, and so no event at its beginning.
    ended = said_of(proxied, 2 if said else 1, client=name)[-1]
    assert (ended["end"], ended.get("detail")) == ("client_left", detail)


# --- who may ---------------------------------------------------------------------------------


def is_taken(port: int, source: str) -> bool:
    """Whether a load balancer at this address is served; a reset may come while it connects."""
    try:
        side = connect(port, source=source)
        with TlsClient(port, source=side) as tls:
            tls.socket.sendall(LINE)
            return talk(tls.handshake())
    except FAILS:
        return False


def test_others_are_refused_and_nothing_of_theirs_is_read(
    serve: Serve, counting: CountingListener
) -> None:
    instance = serve(counting.address, listen=behind("127.1.2.0/24", "127.1.3.1", "::1"))
    before = counting.connections
    for source, listed in (
        ("127.1.2.1", True),
        ("127.1.2.255", True),
        ("127.1.3.1", True),
        ("127.1.3.2", False),
        ("127.1.1.255", False),
        ("127.0.0.1", False),
    ):
        assert is_taken(instance.port, source) == listed

    def refused() -> int:
        return sum(event["count"] for event in instance.events_named("limited"))

    eventually(lambda: refused() >= 3, "three were refused")
    events = instance.events_named("limited")
    assert {event["limit"] for event in events} == {"accept_proxy_from"}
    assert events[-1]["last_client"] in ("127.1.3.2", "127.1.1.255", "127.0.0.1")
    assert len(instance.events_named("connection_begun")) == 3
    assert counting.connections == before + 3
    assert status(instance)["counts"]["limited"] == {"accept_proxy_from": 3}


def test_a_balancer_on_ipv4_at_a_socket_of_both_families(serve: Serve, echoing: Listener) -> None:
    """It is listed by its own address, and not as that socket shows it."""
    port = free_port()
    listen = {"address": f"[::]:{port}", "accept_proxy_from": ["127.0.0.1"]}
    serve(echoing.address, listen=[listen])
    assert is_taken(port, "127.0.0.1")
    with suppress(ConnectionResetError), connect(port, "::1") as other:
        assert was_reset(other)


def test_limits_are_for_the_client_and_not_for_its_balancer(
    serve: Serve, counting: CountingListener
) -> None:
    instance = serve(counting.address, listen=behind(), limits={"connections_per_address": 2})

    def through(client: str) -> TlsClient:
        tls = TlsClient(instance.port)
        tls.socket.sendall(f"PROXY TCP4 {client} 203.0.113.2 5 443\r\n".encode())
        return tls

    def ends(end: str) -> list[Event]:
        return [event for event in instance.events() if event.get("end") == end]

    kept = [through(client) for client in ("192.0.2.1", "192.0.2.1", "192.0.2.2", "192.0.2.3")]

    def is_refused(client: str) -> bool:
        """Its handshake may be done when it is: a worker does not wait for what the parent says."""
        with through(client) as tls, suppress(FAILS):
            return not talk(tls.handshake())
        return True

    assert all(talk(tls.handshake()) for tls in kept)
    before = counting.connections
    assert is_refused("192.0.2.1")
    assert is_refused("192.0.2.1")
    refused = eventually(lambda: len(found := ends("connections_per_address")) == 2 and found, "2")
    assert {event["client"] for event in refused} == {"192.0.2.1:5"}
    assert counting.connections == before
    for tls in kept:
        tls.close_notify()
        tls.receive_all()
        tls.socket.close()
    eventually(lambda: len(ends("clean")) == 4, "the others' end")
    # Whoever was refused was not counted twice, nor taken off twice.
    again = [through("192.0.2.1") for _ in range(2)]
    assert all(talk(tls.handshake()) for tls in again)
    assert is_refused("192.0.2.1")
    for tls in again:
        tls.socket.close()


def test_the_rate_is_limited_before_there_is_a_header(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address, listen=behind(), limits={"connections_per_second": 1})
    with ExitStack() as stack:
        for _ in range(4):
            # One that is refused may be reset before it knows that it was connected.
            with suppress(ConnectionResetError):
                stack.enter_context(connect(instance.port))
        event = instance.wait_for_event("limited", limit="connections_per_second")
    assert event["last_client"] == "127.0.0.1"


# --- with others -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def telling(serve_all: Serve) -> Iterator[tuple[Instance, Listener]]:
    """Its backend is told of each client, and is in the test's hands."""
    with Listener.tcp() as told:
        vhost = {"backend": told.address, "send_proxy": "v2"}
        yield serve_all(listen=behind(), vhost=[vhost]), told


@pytest.mark.parametrize(
    ("header", "client", "server"),
    [
        (LINE, "192.0.2.1", "203.0.113.2"),
        (LINE6, "2001:db8::1", "2001:db8::2"),
        # Two families, as IPv6.
        (MAPPED, "::ffff:192.0.2.1", "::1"),
    ],
)
def test_a_backend_is_told_what_the_balancer_said(
    telling: tuple[Instance, Listener], header: bytes, client: str, server: str
) -> None:
    instance, told = telling
    with TlsClient(instance.port) as tls:
        tls.socket.sendall(header)
        tls.handshake()
        with told.accept() as connection:
            head = receive_exactly(connection, 16)
            body = receive_exactly(connection, int.from_bytes(head[14:], "big"))
    result = ProxyProtocolV2().unpack(head + body)
    assert result.source == (ip_address(client), 56324)
    assert result.dest == (ip_address(server), 443)


@pytest.mark.parametrize(
    ("how", "source"),
    [
        ("send-proxy", "::1"),
        ("send-proxy", "127.9.9.9"),
        ("send-proxy-v2", "::1"),
        # With health checks, which it sends as LOCAL.
        ("send-proxy-v2 check inter 100ms", "127.9.9.9"),
    ],
)
def test_behind_haproxy(proxied: Instance, tmp_path: Path, how: str, source: str) -> None:
    since = len(proxied.events())
    with haproxy_in_front(tmp_path, proxied.port, how) as port:
        host = "::1" if ":" in source else "127.0.0.1"
        side = connect(port, host, source=source)
        with TlsClient(port, source=side) as tls:
            assert talk(tls.handshake())
            number = side.getsockname()[1]
            client = f"[::1]:{number}" if ":" in source else f"{source}:{number}"
            begun = proxied.wait_for_event("connection_begun", since=since, client=client)
            assert begun["balancer"].startswith("127.0.0.1:")


def test_behind_curl(serve: Serve, nginx: Nginx, certificates: Certificates) -> None:
    instance = serve(nginx.address, listen=behind())
    done = subprocess.run(
        ["curl", "--silent", "--haproxy-protocol", "--cacert", certificates().authority,
         "--resolve", f"localhost:{instance.port}:127.0.0.1",
         "--write-out", "%{local_ip}:%{local_port}", f"https://localhost:{instance.port}/"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    page, _, client = done.stdout.rpartition("\n")
    assert page == "It works."
    assert instance.wait_for_event("connection_begun", client=client)["balancer"] == client


def test_the_audit_gets_in_where_its_machine_is_listed(proxied: Instance) -> None:
    with Probe(find_target(proxied.pid)) as probe:
        probe.find_worker()
        probe.shake_hands()
        assert probe.worker is not None
        assert probe.worker.uid in proxied.uids


def test_the_audit_says_why_it_does_not_get_in(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address, listen=behind("10.0.0.0/8"))
    listed = "accept_proxy_from does not list 127.0.0.1, where the audit connects from"
    with pytest.raises(Unanswered, match=listed):
        Probe(find_target(instance.pid))


def test_a_reload_takes_the_balancer_away_and_its_clients_stay(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address, listen=behind())
    with TlsClient(instance.port) as earlier:
        earlier.socket.sendall(LINE)
        assert talk(earlier.handshake())
        edit(instance, lambda tables: tables["listen"][0].pop("accept_proxy_from"))
        assert reload(instance)["reloaded"] is True
        with TlsClient(instance.port) as direct:
            assert talk(direct.handshake())
        assert talk(earlier)


def test_one_listener_beside_another(serve: Serve, echoing: Listener) -> None:
    """Clients of the other one connect themselves; and a header there is not TLS."""
    listen = behind()
    port = free_port()
    listen.append({"address": f"127.0.0.1:{port}"})
    instance = serve(echoing.address, listen=listen)
    with TlsClient(port) as tls:
        assert talk(tls.handshake())
    with TlsClient(instance.port) as tls:
        tls.socket.sendall(LINE)
        assert talk(tls.handshake())
    with TlsClient(port) as tls:
        tls.socket.sendall(LINE)
        with pytest.raises(FAILS):
            tls.handshake()
        assert said_of(instance, 2, client=name_of(tls.socket))[-1]["end"] == "not_tls"
