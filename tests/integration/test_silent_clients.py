"""Clients that connect and say nothing: they cost no process."""

import socket
import time
from contextlib import ExitStack
from typing import Any, cast

import pytest

from .conftest import Serve
from .instance import Instance, Process, eventually, free_port
from .peers import Listener, TlsClient, connect, reset
from .service import reload, serves, status, talk

#: More than have an event of their own while they come.
FLOOD = 500


def spares(instance: Instance) -> set[Process]:
    """Once nobody is served, and as many are there as there may be."""
    instance.settled_counts()
    return set(instance.confined_workers(4))


def told_of(instance: Instance) -> int:
    """How many handshakes have failed, each or together."""
    together = instance.events_named("silent_clients")
    own = instance.events_named("handshake_failed")
    return len(own) + sum(event["count"] for event in together)


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["FIN", "RST"])
def test_who_connects_and_leaves_takes_no_worker(
    serve: Serve, echoing: Listener, leave: object
) -> None:
    """Health checks and port scanners. With the control: one octet takes one."""
    instance = serve(echoing.address)
    before = spares(instance)
    for number in range(1, 11):
        client = connect(instance.port)
        assert callable(leave)
        leave(client)
        failed = instance.wait_for_events(number, "handshake_failed")
    assert set(instance.workers()) == before
    assert {event["end"] for event in failed} == {"client_left"}
    assert {event["level"] for event in failed} == {"info"}
    assert all("uid" not in event for event in failed)
    assert not instance.events_named("connection_begun")

    with connect(instance.port) as client:
        client.sendall(b"\x16")
    failed = instance.wait_for_events(11, "handshake_failed")
    assert (failed[10]["end"], failed[10]["detail"]) == ("client_left", "after 1 octets")
    eventually(lambda: before - set(instance.workers()), "a worker has been used up")

    with connect(instance.port) as client:
        # The kernel does not count an urgent octet.
        client.send(b"G", socket.MSG_OOB)
        client.sendall(b"ET / HTTP/1.1\r\n\r\n")
        name = "{}:{}".format(*client.getsockname())
        assert "uid" in instance.wait_for_event("handshake_failed", client=name)


def test_of_many_that_connect_and_leave_most_are_only_counted(
    serve: Serve, echoing: Listener
) -> None:
    """A flood of them takes no room from other events."""
    instance = serve(echoing.address)
    spares(instance)
    already = status(instance)["counts"]["accepted"]
    started = time.monotonic()
    for _ in range(FLOOD):
        connect(instance.port).close()

    def counts() -> dict[str, Any]:
        return cast(dict[str, Any], status(instance)["counts"])

    eventually(lambda: counts()["accepted"] == already + FLOOD, "each is counted")
    seconds = time.monotonic() - started
    eventually(lambda: told_of(instance) == FLOOD, "each is told of")
    own = len(instance.events_named("handshake_failed"))
    assert own <= 20 * (seconds + 1), "of each second, a few have an event of their own"
    together = instance.events_named("silent_clients", end="client_left", last_client="127.0.0.1")
    assert 0 < len(together) <= seconds + 1, "once a second"
    assert counts()["failed"]["client_left"] >= FLOOD
    assert not counts()["events_lost"]

    # Those that leave just before the end are counted, too.
    for _ in range(50):
        connect(instance.port).close()
    # It came last, and so all of them have been accepted.
    assert serves(instance)
    assert instance.terminate() == 0
    assert told_of(instance) == FLOOD + 50


def test_who_speaks_late_is_served(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address, worker={"handshake_timeout": "10s"})
    before = spares(instance)
    with TlsClient(instance.port) as client, connect(instance.port) as silent:
        time.sleep(5)
        assert set(instance.workers()) == before
        hello = client.first_flight()
        client.socket.sendall(hello[:100])
        time.sleep(0.1)
        assert set(instance.workers()) == before
        client.socket.sendall(hello[100:])
        # As long as anybody, from now on.
        time.sleep(6)
        assert talk(client.handshake())
        with pytest.raises(ConnectionResetError):
            silent.recv(1)
        name = "{}:{}".format(*silent.getsockname())
    event = instance.wait_for_event("handshake_failed", client=name)
    assert event["end"] == "handshake_timeout"
    assert 9.9 < event["seconds"] < 40


def test_when_it_is_full_of_silent_ones_the_first_of_them_goes(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(
        echoing.address,
        worker={"max": 4, "handshake_timeout": "60s"},
        limits={"connections_per_prefix": 100},
    )
    with ExitStack() as stack:
        talker = stack.enter_context(TlsClient(instance.port))
        assert talk(talker.handshake())
        silent = [stack.enter_context(connect(instance.port)) for _ in range(3)]
        for number in range(3):
            # Each of these takes the place of a silent one, and leaves its own free.
            assert serves(instance)
            with pytest.raises(ConnectionResetError):
                silent[number].recv(1)
            instance.wait_for_events(number + 1, "connection_ended")
            silent.append(stack.enter_context(connect(instance.port)))
        assert talk(talker)
        event = instance.wait_for_event("limited", limit="silent")
        assert "worker.max" in event["advice"]
        eventually(lambda: status(instance)["counts"]["limited"] == {"silent": 3}, "each counted")
        assert not instance.events_named("full")


def test_silent_ones_do_not_keep_idle_connections_from_giving_way(
    serve: Serve, echoing: Listener
) -> None:
    """They come faster than each has been silent for long enough to be turned away."""
    instance = serve(
        echoing.address,
        worker={"max": 4, "handshake_timeout": "2s"},
        limits={"connections_per_prefix": 100, "handshakes": 3},
    )
    with ExitStack() as stack:
        for _ in range(3):
            idle = stack.enter_context(TlsClient(instance.port))
            assert talk(idle.handshake())
        # Until then nobody gives way: a newcomer may stand still for as long.
        time.sleep(2.5)
        for _ in range(20):
            stack.enter_context(connect(instance.port))
        assert serves(instance)
        ends = [event["end"] for event in instance.wait_for_events(3, "connection_ended")]
        # Newcomers get no more places in that way than limits.handshakes.
        assert ends.count("gave_way") == 2


def test_a_load_balancer_has_its_own_time(serve: Serve, echoing: Listener) -> None:
    instance = serve(
        echoing.address,
        listen=[
            {
                "address": f"127.0.0.1:{free_port()}",
                "accept_proxy_from": ["127.0.0.1"],
                "proxy_timeout": "1s",
            }
        ],
        worker={"handshake_timeout": "60s"},
    )
    before = set(instance.confined_workers(4))
    with connect(instance.port) as balancer:
        with pytest.raises(ConnectionResetError):
            balancer.recv(1)
        assert instance.wait_for_event("handshake_failed")["end"] == "proxy_timeout"
    assert set(instance.workers()) == before


def test_who_was_silent_during_a_reload_is_served_by_the_generation_that_accepted(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address, worker={"handshake_timeout": "60s"})
    with TlsClient(instance.port) as silent:
        # This one was accepted before the next.
        assert serves(instance)
        assert reload(instance)["reloaded"]
        assert talk(silent.handshake())


def test_a_stop_waits_for_silent_ones_no_longer_than_they_may_be(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address, worker={"handshake_timeout": "3s", "drain": "60s"})
    with connect(instance.port) as silent:
        assert serves(instance)
        started = time.monotonic()
        assert instance.terminate() == 0
        assert time.monotonic() - started < 20
        with pytest.raises(ConnectionResetError):
            silent.recv(1)


def test_nothing_is_left_of_them(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address)
    before = instance.settled_counts()
    clients = [connect(instance.port) for _ in range(100)]
    assert serves(instance)
    for client in clients:
        client.close()
    eventually(lambda: told_of(instance) == 100, "the end of each")
    assert instance.settled_counts() == before
