"""How much of the proxy a client may have."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
from OpenSSL import SSL

from .conftest import Serve
from .instance import Event, Instance, eventually, free_port
from .peers import TIMEOUT, Listener, TlsClient, Truncated
from .service import serves, talk

REFUSED = (ConnectionResetError, BrokenPipeError, SSL.Error, Truncated)
HALF_OPEN = 2000


def connect_from(source: str, port: int) -> socket.socket:
    """From an address of one's own: all of 127.0.0.0/8 are ours."""
    host = "::1" if ":" in source else "127.0.0.1"
    return socket.create_connection((host, port), TIMEOUT, (source, 0))


def client_from(source: str, port: int) -> TlsClient:
    return TlsClient(port, source=connect_from(source, port))


def is_refused(source: str, port: int) -> bool:
    """Without a word: the connection is reset."""
    try:
        client = client_from(source, port)
    except ConnectionResetError:
        return True
    with client:
        try:
            client.handshake()
        except REFUSED:
            assert not client.received
            return True
    return False


def limited(instance: Instance, limit: str, count: int) -> list[Event]:
    """What was said of this limit, once it adds up to so many."""

    def events() -> list[Event]:
        return instance.events_named("limited", limit=limit)

    eventually(lambda: sum(event["count"] for event in events()) >= count, f"{limit}: {count}")
    assert sum(event["count"] for event in events()) == count
    assert {event["level"] for event in events()} == {"warning"}
    return events()


# --- how many --------------------------------------------------------------------------


def test_an_address_has_so_many_connections_and_others_have_theirs(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address, limits={"connections_per_address": 3})
    with ExitStack() as stack:
        clients = [stack.enter_context(client_from("127.1.0.1", instance.port)) for _ in range(3)]
        assert all(talk(client.handshake()) for client in clients)
        started = time.monotonic()
        for _ in range(20):
            assert is_refused("127.1.0.1", instance.port)
        seconds = time.monotonic() - started
        with client_from("127.1.0.2", instance.port) as other:
            assert talk(other.handshake())
        events = limited(instance, "connections_per_address", 20)
        assert len(events) <= seconds + 2, "once a second"
        assert {event["last_client"] for event in events} == {"127.1.0.1"}
        clients[0].socket.close()
        instance.wait_for_events(2, "connection_ended")
        with client_from("127.1.0.1", instance.port) as fourth:
            assert talk(fourth.handshake())
        assert all(talk(client) for client in clients[1:])


def test_a_24_has_so_many_connections_and_others_have_theirs(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address, limits={"connections_per_prefix": 3})
    with ExitStack() as stack:
        for host in (1, 2, 255):
            client = stack.enter_context(client_from(f"127.1.1.{host}", instance.port))
            assert talk(client.handshake())
        assert is_refused("127.1.1.77", instance.port)
        assert is_refused("127.1.1.1", instance.port)
        for neighbour in ("127.1.0.1", "127.1.2.1"):
            with client_from(neighbour, instance.port) as other:
                assert talk(other.handshake())
        limited(instance, "connections_per_prefix", 2)


def test_a_64_has_so_many_connections_and_ipv4_on_the_same_socket_has_its_own(
    serve: Serve, echoing: Listener
) -> None:
    port = free_port()
    instance = serve(
        echoing.address,
        listen=[{"address": f"[::]:{port}"}],
        limits={"connections_per_prefix": 2},
    )
    with ExitStack() as stack:
        for source in ("::1", "::1", "127.1.1.1", "127.1.1.2"):
            client = stack.enter_context(client_from(source, port))
            assert talk(client.handshake())
        assert is_refused("::1", port)
        assert is_refused("127.1.1.3", port)
        assert not is_refused("127.1.2.1", port)
        events = limited(instance, "connections_per_prefix", 2)
    assert events[-1]["last_client"] == "127.1.1.3"


def test_so_many_new_connections_a_second_are_taken(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address, limits={"connections_per_second": 5})
    started = time.monotonic()
    refused = [is_refused("127.0.0.1", instance.port) for _ in range(40)]
    seconds = time.monotonic() - started
    assert refused[:5] == [False] * 5
    # The bucket is full at the start, and refilled as time goes by.
    assert 40 - refused.count(True) <= 5 + 5 * seconds + 1
    limited(instance, "connections_per_second", refused.count(True))
    time.sleep(1.1)
    assert [is_refused("127.0.0.1", instance.port) for _ in range(5)] == [False] * 5


def test_a_limit_that_was_hit_just_before_the_end_is_still_told(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address, limits={"connections_per_address": 1})
    with TlsClient(instance.port) as client:
        client.handshake()
        assert is_refused("127.0.0.1", instance.port)
    assert instance.terminate() == 0
    limited(instance, "connections_per_address", 1)


# --- how long --------------------------------------------------------------------------


def test_a_connection_that_stands_still_is_ended(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address, limits={"idle_timeout": "1s"})
    with TlsClient(instance.port) as client:
        client.handshake()
        # Not while something is being said.
        for _ in range(6):
            assert talk(client)
            time.sleep(0.3)
        started = time.monotonic()
        with pytest.raises(REFUSED):
            assert client.receive()
        assert 0.5 < time.monotonic() - started < 5
    end = instance.wait_for_event("connection_ended")
    assert (end["end"], end["octets_from_client"]) == ("idle", 24)


def test_a_connection_ends_with_its_lifetime_whatever_it_does(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address, limits={"lifetime": "1s"})
    with TlsClient(instance.port) as client:
        client.handshake()
        started = time.monotonic()
        with pytest.raises(REFUSED):
            talk_until(client, started + 10)
        assert 0.5 < time.monotonic() - started < 5
    assert instance.wait_for_event("connection_ended")["end"] == "lifetime"
    assert serves(instance)


def talk_until(client: TlsClient, end: float) -> None:
    while time.monotonic() < end:
        assert talk(client)


# --- handshakes ------------------------------------------------------------------------


def test_the_slowest_handshake_is_ended_for_a_newcomer(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address, limits={"handshakes": 3})
    slow = []
    for _ in range(3):
        slow.append(connect_from("127.1.0.1", instance.port))
        instance.wait_for_events(len(slow), "connection_begun")
    try:
        assert serves(instance)
        with pytest.raises(ConnectionResetError):
            slow[0].recv(1)
        end = instance.wait_for_event("handshake_failed", end="handshakes_limit")
        assert end["client"] == "{}:{}".format(*instance_side(slow[1:], end))
        limited(instance, "handshakes", 1)
        for left in slow[1:]:
            left.settimeout(0.2)
            with pytest.raises(TimeoutError):
                left.recv(1)
    finally:
        for one in slow:
            one.close()


def instance_side(others: list[socket.socket], end: Event) -> tuple[str, str]:
    """The client in this record, which is none of these."""
    host, _, port = end["client"].rpartition(":")
    assert int(port) not in [other.getsockname()[1] for other in others]
    return host, port


@contextmanager
def half_open(port: int, sources: list[str]) -> Iterator[list[socket.socket]]:
    """Clients that connect, say half of what they should, and then nothing more."""
    flood: list[socket.socket] = []

    def come() -> None:
        for source in sources:
            one = connect_from(source, port)
            flood.append(one)
            with suppress(ConnectionResetError, BrokenPipeError):
                one.sendall(b"\x16\x03\x01\x02\x00\x01")

    thread = threading.Thread(target=come)
    thread.start()
    try:
        yield flood
    finally:
        thread.join()
        for one in flood:
            one.close()


def patiently(instance: Instance) -> float:
    """How long it takes a client to be served who tries again when it is turned away."""
    started = time.monotonic()
    while True:
        with suppress(*REFUSED):
            assert serves(instance)
            return time.monotonic() - started
        time.sleep(0.05)


def test_half_open_clients_from_one_address_leave_the_others_served(
    serve: Serve, echoing: Listener
) -> None:
    worker = {"max": 1000, "handshake_timeout": "60s"}
    instance = serve(echoing.address, worker=worker, limits={"connections_per_address": 50})
    waits = []
    with half_open(instance.port, ["127.9.9.9"] * HALF_OPEN) as flood:
        started = time.monotonic()
        while time.monotonic() < started + 3 or len(flood) < HALF_OPEN:
            waits.append(patiently(instance))
            time.sleep(0.1)
        print(f"\n{len(waits)} others served, the slowest after {max(waits):.2f} s")
        limited(instance, "connections_per_address", HALF_OPEN - 50)
    assert max(waits) < 3


def test_half_open_clients_from_many_addresses_leave_the_others_served(
    serve: Serve, echoing: Listener
) -> None:
    """As soon as all have got through the queue: each costs the start of a process."""
    worker = {"max": 400, "handshake_timeout": "120s"}
    instance = serve(echoing.address, worker=worker, limits={"handshakes": 100})
    sources = [f"127.{9 + n % 100}.{n // 100}.{1 + n % 200}" for n in range(HALF_OPEN)]
    started = time.monotonic()
    with half_open(instance.port, sources):
        instance.wait_for_events(HALF_OPEN, "connection_begun", 120)
        digested = time.monotonic() - started
        assert len(instance.workers()) < 200
        waits = [patiently(instance) for _ in range(10)]
        print(
            f"\n{HALF_OPEN} let in within {digested:.1f} s; "
            f"the slowest of {len(waits)} others was served after {max(waits):.2f} s"
        )
    assert max(waits) < 3
    ended = len(instance.events_named("handshake_failed", end="handshakes_limit"))
    assert HALF_OPEN - 100 < ended <= HALF_OPEN - 100 + 10
    limited(instance, "handshakes", ended)
    assert not instance.events_named("full")
