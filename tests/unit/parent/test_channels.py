"""The parent's socket to keyd: what keyd said before it ended is heard."""

import socket
import time
from contextlib import suppress

import pytest
from integration.watches import without_watches

from keyd.protocol import (
    MAX_CLIENT_HELLO_OCTETS,
    MAX_CONTROL_OCTETS,
    Done,
    Grant,
    GrantSet,
    Open,
    Operation,
    Power,
    Refusal,
    Status,
)
from titus_py.between.event_loop import EventLoop
from titus_py.parent.channels import Channels
from titus_py.parent.worker import Offer


def test_refusals_are_heard_of_a_keyd_that_ended_with_orders_unread() -> None:
    """An alarm that keyd rang just before it died must not be lost with it."""
    refusal = Refusal(7, Status.NOT_TLS, "a token")
    done = Done(7, Operation.SIGN)
    heard: list[Refusal | Done] = []
    told: list[str] = []
    loop = EventLoop()
    channels = Channels(
        loop, lambda event, *_, **__: told.append(event), heard.append, heard.append, lambda _: None
    )
    ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(b"an order that is never read")
    channels.take([ours.detach()])
    keyds.send(refusal.encode())
    keyds.send(done.encode())
    keyds.close()
    while not told:
        loop.run_once()
    assert heard == [refusal, done]
    assert told == ["keyd_lost"]
    assert not channels.there


def test_what_keyd_has_said_so_far_is_heard_when_it_is_asked_for() -> None:
    """Before a connection's end is judged: without another turn of the loop."""
    heard: list[Refusal | Done] = []
    channels = Channels(
        EventLoop(), lambda *_, **__: None, heard.append, heard.append, lambda _: None
    )
    ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channels.take([ours.detach()])
    channels.catch_up()
    said = [Done(7, Operation.SIGN), Refusal(8, Status.NOT_TLS, "a token"), Done(9, Operation.SIGN)]
    for message in said:
        keyds.send(message.encode())
    channels.catch_up()
    assert heard == said
    keyds.close()
    channels.catch_up()
    assert heard == said


def test_one_turn_of_the_loop_hears_all() -> None:
    """In a turn, many clients may come: their reports come no slower than they are heard."""
    heard: list[Refusal | Done] = []
    loop = EventLoop()
    channels = Channels(loop, lambda *_, **__: None, heard.append, heard.append, lambda _: None)
    ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with keyds:
        channels.take([ours.detach()])
        said = [Done(number, Operation.SIGN) for number in range(200)]
        for message in said:
            keyds.send(message.encode())
        loop.run_once()
    assert heard == said


def test_a_queue_that_is_full_of_long_hellos_is_waited_for_and_no_longer() -> None:
    """One of 131,400 octets nearly fills it: others' channels do not wait for a timer."""
    loop = EventLoop()
    channels = Channels(loop, lambda *_, **__: None, lambda _: None, lambda _: None, lambda _: None)
    ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channels.take([ours.detach()])
    offer = Offer((0,), GrantSet(0, ()))
    client, peer = socket.socketpair()

    def open_one(hello: bytes) -> bool:
        channel = channels.open(1, offer, 1.0, hello, [client])
        if channel is not None:
            channel.close()
        return channel is not None

    with keyds:
        while open_one(bytes(MAX_CLIENT_HELLO_OCTETS)):
            pass
        assert not open_one(b"short")
        client.send(b"waits")
        assert peer.recv(9) == b"waits"
        keyds.setblocking(False)
        heard = 0
        with suppress(BlockingIOError):
            while keyds.recv(MAX_CONTROL_OCTETS):
                heard += 1
        assert heard > 1
        # Nothing else could wake the loop: there is no timer.
        loop.run_once()
        assert open_one(b"short")
        assert Open.decode(keyds.recv(MAX_CONTROL_OCTETS)).client_hello == b"short"
        # It does not go on waking up.
        waits = []
        loop.after(0.05, lambda: waits.append(None))
        loop.run_once()
        assert waits
    client.close()
    peer.close()


def test_a_hello_that_no_message_has_room_for_keeps_nobody_waiting() -> None:
    """A queue can be smaller than the longest (net.core.wmem_default)."""
    channels = Channels(
        EventLoop(), lambda *_, **__: None, lambda _: None, lambda _: None, lambda _: None
    )
    ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * 1024)
    with keyds:
        channels.take([ours.detach()])
        offer = Offer((0,), GrantSet(0, ()))
        channel = channels.open(1, offer, 1.0, bytes(MAX_CLIENT_HELLO_OCTETS))
        assert channel is not None
        channel.close()
        keyds.recv(MAX_CONTROL_OCTETS)
        # keyd says so when it is asked for anything.
        assert Open.decode(keyds.recv(MAX_CONTROL_OCTETS)).client_hello == b""


def test_many_names_are_told_in_messages_for_which_there_is_room() -> None:
    """A queue can be as small as this (net.core.wmem_default)."""
    loop = EventLoop()
    channels = Channels(loop, lambda *_, **__: None, lambda _: None, lambda _: None, lambda _: None)
    ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    # The longest names that there are (RFC 1035 §2.3.4).
    grants = tuple(
        Grant(number, f"{number:03}".ljust(253, "a"), bytes(32), frozenset({Power.SIGN_TLS13}))
        for number in range(200)
    )
    keyds.settimeout(30)
    told: list[Grant] = []
    opened = None
    deadline = time.monotonic() + 30
    with keyds:
        channels.take([ours.detach()])
        while opened is None:
            assert time.monotonic() < deadline
            opened = channels.open(1, Offer((0,), GrantSet(7, grants)), 1.0, b"hello")
            if opened is None:
                told += GrantSet.decode(keyds.recv(MAX_CONTROL_OCTETS)).grants
                loop.run_once()
        opened.close()
        while (message := keyds.recv(MAX_CONTROL_OCTETS))[1:2] == b"G":
            told += GrantSet.decode(message).grants
        assert Open.decode(message).grants == 7
    assert tuple(told) == grants


def test_a_keyd_that_goes_on_talking_keeps_the_parent_from_nothing() -> None:
    """Each message that is heard is followed by another one."""
    said = Done(7, Operation.SIGN)
    heard: list[Refusal | Done] = []

    def hear(report: Refusal | Done) -> None:
        heard.append(report)
        if len(heard) < 10_000:
            keyds.send(said.encode())

    channels = Channels(EventLoop(), lambda *_, **__: None, hear, hear, lambda _: None)
    ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with keyds:
        channels.take([ours.detach()])
        keyds.send(said.encode())
        channels.catch_up()
    assert 500 < len(heard) < 5000


def test_keyd_is_heard_where_no_watch_is_left() -> None:
    """The parent would end, and each connection with it, for want of what it had a moment ago."""
    told: list[str] = []
    loop = EventLoop()
    channels = Channels(loop, lambda event, *_, **__: told.append(event), *[lambda _: None] * 3)
    ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with keyds:
        channels.take([ours.detach()])

        def serve() -> None:
            hello = bytes(MAX_CLIENT_HELLO_OCTETS)
            while channel := channels.open(1, Offer((0,), GrantSet(0, ())), 1.0, hello):
                channel.close()
            keyds.setblocking(False)
            with suppress(BlockingIOError):
                while keyds.recv(MAX_CONTROL_OCTETS):
                    pass
            loop.run_once()
            keyds.shutdown(socket.SHUT_WR)
            while channels.there:
                loop.run_once()

        without_watches(serve, loop._epoll)
    while not told:
        loop.run_once()
    assert told == ["keyd_lost"]


def test_a_keyd_for_which_no_watch_is_left_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("titus_py.parent.channels._LOST_SECONDS", 0.0)
    told: list[str] = []
    loop = EventLoop()
    channels = Channels(loop, lambda event, *_, **__: told.append(event), *[lambda _: None] * 3)
    ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with keyds:
        without_watches(lambda: channels.take([ours.detach()]), loop._epoll)
        assert not keyds.recv(1)
    assert not channels.there
    loop.run_once()
    assert told == ["keyd_lost"]
