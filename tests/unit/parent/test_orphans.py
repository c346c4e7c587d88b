"""Another channel, once keyd has ended: for whom it had signed nothing, and once."""

import gc
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any

import pytest

from keyd.linux.descriptors import receive_descriptors
from keyd.protocol import (
    ANY_NAME,
    MAX_CONTROL_OCTETS,
    MAX_REFUSAL_OCTETS,
    Done,
    Grant,
    GrantSet,
    Open,
    Operation,
    Parting,
    Power,
    Refusal,
    Status,
    decode_control,
)
from titus_py.between import messages
from titus_py.between.event_loop import EventLoop
from titus_py.between.hand_over import take
from titus_py.parent.channels import Channels
from titus_py.parent.orphans import Orphans
from titus_py.parent.worker import Offer, Worker

_OFFER = Offer((0,), GrantSet(0, (Grant(0, ANY_NAME, bytes(32), frozenset({Power.SIGN_TLS13})),)))
_PLAN: Any = SimpleNamespace(handshake_timeout=60.0)


class Parent:
    """Channels, orphans, and workers in their handshake: by the numbers of their connections."""

    def __init__(self, *connections: int) -> None:
        self.workers: dict[int, Worker] = {}
        self.ends: dict[int, socket.socket] = {}
        for number in connections:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            theirs.setblocking(False)
            worker = Worker(number, -1, ours)
            worker.connection, worker.offer, worker.started = number, _OFFER, time.monotonic()
            worker.client_hello = b"hello %d" % number
            self.workers[number], self.ends[number] = worker, theirs
        self.loop = EventLoop()
        self.orphans = Orphans(_PLAN, self.workers)
        self.channels = Channels(
            self.loop, lambda *_, **__: None, lambda _: None, self._done, self.orphans.lost
        )

    def _done(self, done: Done) -> None:
        self.workers[done.connection].signed = True

    def gets_a_keyd(self, room: int | None = None) -> socket.socket:
        """``room``: half the size of both ends' buffers."""
        ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if room is not None:
            for end in (ours, keyds):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        keyds.setblocking(False)
        self.channels.take([ours.detach()])
        return keyds

    def loses_keyd(self, keyd: socket.socket) -> None:
        keyd.close()
        while self.channels.there:
            self.loop.run_once()

    def opened_at(self, keyd: socket.socket) -> dict[int, bytes]:
        """For which connections channels were opened there, and with which first messages."""
        self.orphans.serve(self.channels)
        opened = {}
        while True:
            try:
                message, descriptors = receive_descriptors(keyd, MAX_CONTROL_OCTETS, 1)
            except BlockingIOError:
                return opened
            for one in descriptors:
                os.close(one)
            order = decode_control(message)
            if isinstance(order, Open):
                opened[order.connection] = order.client_hello

    def gave(self, connection: int) -> int:
        """With how many channels its worker was told of one."""
        message, descriptors = take(self.ends[connection], messages.MAX_CLIENT_OCTETS, 1)
        for one in descriptors:
            os.close(one)
        assert message == messages.CHANNEL
        with pytest.raises(BlockingIOError):
            self.ends[connection].recv(1)
        return len(descriptors)


@pytest.fixture
def parent() -> Iterator[Parent]:
    made = Parent(1, 2)
    yield made
    for worker in made.workers.values():
        worker.socket.close()
    for end in made.ends.values():
        end.close()


@pytest.mark.parametrize("replaced", [False, True], ids=["noticed", "replaced before"])
def test_who_has_its_signature_gets_no_other_channel(parent: Parent, replaced: bool) -> None:
    keyd = parent.gets_a_keyd()
    keyd.send(Done(1, Operation.SIGN).encode())
    if replaced:
        keyd.close()
    else:
        parent.loses_keyd(keyd)
    with parent.gets_a_keyd() as following:
        assert parent.opened_at(following) == {2: b"hello 2"}
        assert (parent.gave(1), parent.gave(2)) == (0, 1)


def test_the_last_words_of_a_keyd_with_unread_orders_count(parent: Parent) -> None:
    keyd = parent.gets_a_keyd()
    channel = parent.channels.open(3, _OFFER, 1.0, b"")
    assert channel is not None
    channel.close()
    keyd.send(Done(1, Operation.SIGN).encode())
    keyd.close()
    with parent.gets_a_keyd() as following:
        assert parent.opened_at(following) == {2: b"hello 2"}


@pytest.mark.parametrize("room", [None, 32 * 1024, 1], ids=["", "64 KiB", "the least"])
def test_where_reports_may_be_lost_nobody_gets_another_channel(
    parent: Parent, room: int | None
) -> None:
    """There was no room for them, or less than usual (net.core.wmem_default)."""
    keyd = parent.gets_a_keyd(room)
    longest = Refusal(3, Status.NOT_TLS, "x" * 200).encode()
    assert len(longest) == MAX_REFUSAL_OCTETS
    with suppress(BlockingIOError):
        while keyd.send(longest):
            pass
    parent.loses_keyd(keyd)
    with parent.gets_a_keyd() as following:
        assert not parent.opened_at(following)


def test_nobody_gets_a_third_channel(parent: Parent) -> None:
    parent.loses_keyd(parent.gets_a_keyd())
    with parent.gets_a_keyd() as second:
        assert set(parent.opened_at(second)) == {1, 2}
        parent.loses_keyd(second)
    with parent.gets_a_keyd() as third:
        assert not parent.opened_at(third)


def test_a_keyd_that_says_that_it_leaves_still_has_its_channels(parent: Parent) -> None:
    keyd = parent.gets_a_keyd()
    keyd.shutdown(socket.SHUT_WR)
    while parent.channels.there:
        parent.loop.run_once()
    parent.channels.done()
    with keyd, parent.gets_a_keyd() as following:
        assert not parent.opened_at(following)


def test_a_keyd_that_said_that_it_leaves_and_is_gone_may_have_signed(parent: Parent) -> None:
    """It could say no more of that."""
    keyd = parent.gets_a_keyd()
    keyd.send(Parting().encode())
    parent.loses_keyd(keyd)
    with parent.gets_a_keyd() as following:
        assert not parent.opened_at(following)


def test_a_keyd_that_was_hung_up_on_still_has_its_channels_when_the_next_one_ends(
    parent: Parent,
) -> None:
    """What it signs, nobody hears any more."""
    keyd = parent.gets_a_keyd()
    keyd.shutdown(socket.SHUT_WR)
    while parent.channels.there:
        parent.loop.run_once()
    parent.channels.done()
    with keyd:
        parent.loses_keyd(parent.gets_a_keyd())
        with parent.gets_a_keyd() as third:
            assert not parent.opened_at(third)


def test_who_is_over_meanwhile_gets_none(parent: Parent) -> None:
    parent.loses_keyd(parent.gets_a_keyd())
    over = parent.workers.pop(1)
    over.socket.close()
    parent.workers[2].kill("gave_way")
    with parent.gets_a_keyd() as following:
        assert not parent.opened_at(following)


@pytest.mark.parametrize("left", [-1.0, 0.0005], ids=["past", "less than a channel's least"])
def test_whose_time_is_over_meanwhile_is_not_to_wait(
    parent: Parent, monkeypatch: pytest.MonkeyPatch, left: float
) -> None:
    parent.loses_keyd(parent.gets_a_keyd())
    with parent.gets_a_keyd() as following:
        over = parent.workers[1].started + _PLAN.handshake_timeout
        monkeypatch.setattr(time, "monotonic", lambda: over - left)
        parent.workers[2].started += 10
        assert parent.opened_at(following) == {2: b"hello 2"}
        assert (parent.gave(1), parent.gave(2)) == (0, 1)


@pytest.fixture
def two_descriptors() -> Iterator[Callable[[], None]]:
    """From when it is called, this process has no more than two free."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit() -> None:
        # What earlier tests left to it would be closed meanwhile.
        gc.collect()
        with ExitStack() as taken:
            free = [os.open("/", os.O_RDONLY) for _ in range(3)]
            for one in free:
                taken.callback(os.close, one)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free[2], hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_whose_channel_cannot_be_given_is_not_to_wait(
    parent: Parent, two_descriptors: Callable[[], None]
) -> None:
    """It takes two descriptors to open one, and three to give it."""
    parent.loses_keyd(parent.gets_a_keyd())
    del parent.workers[2]
    with parent.gets_a_keyd():
        two_descriptors()
        parent.orphans.serve(parent.channels)
        assert parent.ends[1].recv(1) == messages.CHANNEL
