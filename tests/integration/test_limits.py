"""How much of the proxy a client may have."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from statistics import median

import pytest
from OpenSSL import SSL

from .conftest import Serve
from .instance import Event, Instance, eventually, free_port
from .peers import TIMEOUT, Listener, TlsClient, Truncated, connect, was_reset
from .service import launcher, serves, status, talk, without_end

REFUSED = (ConnectionResetError, BrokenPipeError, SSL.Error, Truncated)
HALF_OPEN = 2000


def connect_from(source: str, port: int) -> socket.socket:
    """From an address of one's own: all of 127.0.0.0/8 are ours."""
    host = "::1" if ":" in source else "127.0.0.1"
    return connect(port, host, source=source)


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


def test_a_24_has_a_quarter_of_all_connections_unless_told_otherwise(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address, worker={"max": 68}, limits={"connections_per_prefix": None})
    with ExitStack() as stack:
        clients = [
            stack.enter_context(client_from(f"127.1.1.{n}", instance.port)) for n in range(1, 18)
        ]
        assert all(talk(client.handshake()) for client in clients)
        assert is_refused("127.1.1.1", instance.port)
        assert not is_refused("127.1.2.1", instance.port)
        [event] = limited(instance, "connections_per_prefix", 1)
    assert "raise limits.connections_per_prefix" in event["advice"]
    assert "accept_proxy_from" in event["advice"]


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
    # All connect at once: on a busy machine, a handshake after the other is slower than the limit.
    with ThreadPoolExecutor(40) as pool:
        refused = [*pool.map(is_refused, ["127.0.0.1"] * 40, [instance.port] * 40)]
    seconds = time.monotonic() - started
    assert refused.count(False) >= 5
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


# --- when it is full ----------------------------------------------------------------------


def test_the_longest_idle_connection_of_the_network_with_most_gives_way(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address, worker={"max": 4, "handshake_timeout": "3s"})
    with ExitStack() as stack:

        def served_from(source: str) -> TlsClient:
            client = stack.enter_context(client_from(source, instance.port))
            assert talk(client.handshake())
            # The kernel times them in ticks: who is idle for longer is so by more than one.
            time.sleep(0.1)
            return client

        alone = served_from("127.2.1.1")
        busy, longest, idle = (served_from(f"127.1.1.{n}") for n in (1, 2, 3))
        name = "{}:{}".format(*longest.socket.getsockname())
        instance.wait_for_event("full")
        talking = time.monotonic() + 4
        while time.monotonic() < talking:
            assert talk(busy)
            time.sleep(0.1)
        assert not instance.events_named("connection_ended"), "nobody has come"
        served_from("127.3.1.1")
        assert instance.wait_for_event("connection_ended", client=name)["end"] == "gave_way"
        with pytest.raises(REFUSED):
            longest.receive()
        # Each of the others was longer idle, or is of a network with more.
        for client in (alone, idle, busy):
            assert talk(client)
        assert len(instance.events_named("connection_ended")) == 1


def test_nobody_gives_way_who_has_just_been_talking(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address, worker={"max": 1, "handshake_timeout": "60s"})
    with TlsClient(instance.port) as first:
        assert talk(first.handshake())
        with TlsClient(instance.port) as second:
            second.socket.sendall(second.first_flight())
            instance.wait_for_event("full")
            second.socket.settimeout(1.5)
            with pytest.raises(TimeoutError):
                second.handshake()
            assert talk(first)
            second.socket.settimeout(TIMEOUT)
            # It is not kept waiting for longer than the first one stays.
            first.socket.close()
            assert talk(second.handshake())


# --- how long --------------------------------------------------------------------------


def test_a_connection_that_stands_still_is_ended(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address, limits={"idle_timeout": "2s"})
    with TlsClient(instance.port) as client:
        client.handshake()
        # Not while something is being said.
        started = time.monotonic()
        times = 0
        while time.monotonic() < started + 3:
            assert talk(client)
            times += 1
            time.sleep(0.1)
        with pytest.raises(REFUSED):
            assert client.receive()
    end = instance.wait_for_event("connection_ended")
    assert (end["end"], end["octets_from_client"]) == ("idle", 4 * times)
    assert end["seconds"] > 4.5


def test_a_connection_ends_with_its_lifetime_whatever_it_does(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address, limits={"lifetime": "3s"})
    with TlsClient(instance.port) as client:
        client.handshake()
        with pytest.raises(REFUSED):
            talk_until(client, time.monotonic() + TIMEOUT)
    ended = instance.wait_for_event("connection_ended")
    assert ended["end"] == "lifetime"
    assert ended["seconds"] >= 3
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
        slow[-1].sendall(first_half())
        instance.wait_for_events(len(slow), "connection_begun")
    try:
        assert serves(instance)
        assert was_reset(slow[0])
        end = instance.wait_for_event("handshake_failed", end="handshakes_limit")
        assert end["client"] == "{}:{}".format(*instance_side(slow[1:], end))
        limited(instance, "handshakes", 1)
        for left in slow[1:]:
            left.settimeout(0.2)
            with pytest.raises(TimeoutError):
                was_reset(left)
    finally:
        for one in slow:
            one.close()


def instance_side(others: list[socket.socket], end: Event) -> tuple[str, str]:
    """The client in this record, which is none of these."""
    host, _, port = end["client"].rpartition(":")
    assert int(port) not in [other.getsockname()[1] for other in others]
    return host, port


@cache
def first_half() -> bytes:
    """A ClientHello that is answered with a HelloRetryRequest: nothing is signed for it yet."""
    unused, also_unused = socket.socketpair()
    with unused, also_unused:
        client = TlsClient(0, source=unused, groups=["X25519", "X25519MLKEM768"])
        return client.first_flight()


def come_half_open(source: str, port: int) -> socket.socket | None:
    """One that connects, says half of what it should, and then nothing more.

    None if it was turned away before it knew that it was connected.
    """
    with suppress(ConnectionResetError):
        one = connect_from(source, port)
        with suppress(ConnectionResetError, BrokenPipeError):
            one.sendall(first_half())
        return one
    return None


@contextmanager
def half_open(port: int, sources: list[str]) -> Iterator[threading.Thread]:
    """Half-open clients; the thread ends when all have come, and they stay."""
    flood = []
    thread = threading.Thread(
        target=lambda: flood.extend([come_half_open(source, port) for source in sources])
    )
    thread.start()
    try:
        yield thread
    finally:
        thread.join()
        for one in flood:
            if one is not None:
                one.close()


class Waits(list[float]):
    """How long clients took to be served who try again when they are turned away."""

    _QUIET = 5

    def __init__(self, port: int) -> None:
        super().__init__()
        self.attempts = 0
        #: What it takes here while nobody else comes: on a busy machine, that is long.
        self.quiet = median(self._once(port) for _ in range(self._QUIET))
        #: How long they have been coming.
        self.seconds = 0.0
        self._began = time.monotonic()

    def come(self, port: int) -> None:
        self.append(self._once(port))
        self.seconds = time.monotonic() - self._began
        time.sleep(0.05)

    def _once(self, port: int) -> float:
        started = time.monotonic()
        while not self._served(port):
            time.sleep(0.05)
        return time.monotonic() - started

    def _served(self, port: int) -> bool:
        self.attempts += 1
        with suppress(*REFUSED), TlsClient(port) as client:
            return talk(client.handshake())
        return False

    def assert_short(self) -> None:
        """For most, a small part of the time that the flood takes: they do not wait for its end.

        That holds on a machine of any speed.
        """
        print(
            f"\n{len(self)} served in {self.attempts} attempts, while the others came for "
            f"{self.seconds:.1f} s: median {median(self):.3f} s, slowest {max(self):.3f} s; "
            f"{self.quiet:.3f} s before"
        )
        assert median(self) < max(self.seconds / 10, 5 * self.quiet)
        assert self.attempts - self._QUIET < 2 * len(self)


def test_half_open_clients_from_one_address_leave_the_others_served(
    serve: Serve, echoing: Listener
) -> None:
    worker = {"max": 1000, "handshake_timeout": "60s"}
    instance = serve(echoing.address, worker=worker, limits={"connections_per_address": 50})
    before = instance.settled_counts()
    waits = Waits(instance.port)
    with half_open(instance.port, ["127.9.9.9"] * HALF_OPEN) as flood:
        started = time.monotonic()
        while time.monotonic() < started + 3 or flood.is_alive():
            waits.come(instance.port)
        limited(instance, "connections_per_address", HALF_OPEN - 50)
    waits.assert_short()
    assert instance.settled_counts() == before


def test_half_open_clients_from_many_addresses_leave_the_others_served(
    serve: Serve, echoing: Listener
) -> None:
    """Most of them are turned away without a process of their own, which is what takes time."""
    worker = {"max": 400, "handshake_timeout": "120s"}
    instance = serve(echoing.address, worker=worker, limits={"handshakes": 100})
    before = instance.settled_counts()
    served_before = len(instance.events_named("connection_begun"))
    waits = Waits(instance.port)
    with half_open(instance.port, many_addresses(HALF_OPEN)) as flood:
        started = time.monotonic()
        while time.monotonic() < started + 3 or flood.is_alive():
            waits.come(instance.port)
        assert len(instance.workers()) < 200

        def unaccounted() -> int:
            """Who waits, after all those who were given a worker or turned away."""
            given = len(instance.events_named("connection_begun")) - served_before
            return HALF_OPEN + waits.attempts - given - (handshakes_hit(instance) - ended())

        def ended() -> int:
            return len(instance.events_named("handshake_failed", end="handshakes_limit"))

        eventually(lambda: unaccounted() == 0, "everybody is accounted for")
        turned_away = handshakes_hit(instance) - ended()
        assert status(instance)["counts"]["limited"] == {"handshakes": turned_away + ended()}
        assert 90 < len(without_end(instance)) <= 100
        print(f"\n{turned_away} turned away at once, {ended()} for another client")
    waits.assert_short()
    assert turned_away > HALF_OPEN // 2
    assert not instance.events_named("full")
    assert instance.settled_counts() == before


def handshakes_hit(instance: Instance) -> int:
    return sum(event["count"] for event in instance.events_named("limited", limit="handshakes"))


def many_addresses(count: int) -> list[str]:
    """No two in the same /24."""
    return [f"127.{9 + n % 100}.{n // 100}.{1 + n % 200}" for n in range(count)]


def test_one_who_comes_within_a_surge_waits_for_no_more_than_the_limit(
    serve: Serve, echoing: Listener
) -> None:
    """As many come behind it as in front; most of both are turned away, and it tries again."""
    limit, worker = 50, {"max": 1000, "handshake_timeout": "60s"}
    instance = serve(echoing.address, worker=worker, limits={"handshakes": limit})
    with ExitStack() as stack:

        def come() -> None:
            for source in many_addresses(300):
                stack.enter_context(come_half_open(source, instance.port) or nullcontext())

        come()
        before = len(instance.events_named("connection_begun"))
        name: str | bool = False
        with suppress(*REFUSED), TlsClient(instance.port) as client:
            # Who says nothing does not wait for a worker yet.
            client.socket.sendall(client.first_flight())
            come()
            name = talk(client.handshake()) and client.name
        while not name:
            with suppress(*REFUSED), TlsClient(instance.port) as client:
                name = talk(client.handshake()) and client.name
        instance.wait_for_event("connection_begun", client=name)
        served = [one["client"] for one in instance.events_named("connection_begun")[before:]]
    print(f"\n{served.index(name)} of {2 * 300} others had a worker before it")
    # The newest client and the oldest have one in turn.
    assert served.index(name) <= 2 * limit


def test_a_connection_through_one_interface_is_not_taken_for_one_that_is_over(
    serve: Serve, echoing: Listener, tmp_path: Path
) -> None:
    """The service manager's socket is bound to it; the kernel knows its connections by it, too."""
    port = free_port()
    program = launcher(tmp_path, ("127.0.0.1", port), interface="lo")
    instance = serve(
        echoing.address,
        program=program,
        listen=[{"address": f"127.0.0.1:{port}"}],
        limits={"half_closed_timeout": "500ms"},
    )
    with TlsClient(instance.port) as client:
        client.handshake()
        # A worker whose client has left is ended after five looks, of which each takes that long.
        time.sleep(8 * 0.5)
        client.send(b"ping")
        assert client.receive_exactly(4) == b"ping"
