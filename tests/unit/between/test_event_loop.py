"""Descriptors and timers, in their turn."""

import os
import socket
import time
from collections.abc import Iterator

import pytest

from titus_py.between.event_loop import WRITABLE, EventLoop


@pytest.fixture
def loop() -> EventLoop:
    return EventLoop()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


# --- descriptors -----------------------------------------------------------------------


def test_a_readable_descriptor_is_called_back_until_it_is_not(
    loop: EventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    heard: list[bytes] = []
    loop.watch(ours.fileno(), lambda: heard.append(ours.recv(1)))
    loop.run_once(wait=False)
    assert not heard
    theirs.send(b"ab")
    for _ in range(3):
        loop.run_once(wait=False)
    assert heard == [b"a", b"b"]


def test_a_descriptor_may_be_watched_for_room_to_write(
    loop: EventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    called: list[bool] = []
    loop.watch(pair[0].fileno(), lambda: called.append(True), WRITABLE)
    loop.run_once()
    assert called


def test_a_descriptor_no_longer_watched_is_not_called_back(
    loop: EventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    called: list[bool] = []
    loop.watch(ours.fileno(), lambda: called.append(True))
    theirs.send(b"x")
    loop.unwatch(ours.fileno())
    loop.run_once(wait=False)
    assert not called


def test_a_callback_may_end_anothers_interest_in_the_same_round(loop: EventLoop) -> None:
    """Whichever of the two comes first."""
    pairs = [socket.socketpair() for _ in range(2)]
    called = []

    def end_the_other(mine: int) -> None:
        called.append(mine)
        loop.unwatch(pairs[1 - mine][0].fileno())

    for number, (ours, theirs) in enumerate(pairs):
        loop.watch(ours.fileno(), lambda number=number: end_the_other(number))  # type: ignore[misc]
        theirs.send(b"x")
    loop.run_once(wait=False)
    assert len(called) == 1
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


def test_an_event_is_not_taken_for_that_of_a_new_descriptor_with_its_number(
    loop: EventLoop,
) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    first, second = (ours for ours, _ in pairs)
    wrongly_called: list[bool] = []
    replacements: list[tuple[socket.socket, socket.socket]] = []
    numbers = {first.fileno(): first, second.fileno(): second}

    def replace_the_other(mine: socket.socket) -> None:
        if replacements:
            return
        (other,) = (side for side in numbers.values() if side is not mine)
        number = other.fileno()
        loop.unwatch(number)
        other.close()
        # The lowest number that is free is the next to be given out (open(2)).
        new = socket.socketpair()
        assert number in (new[0].fileno(), new[1].fileno())
        replacements.append(new)
        loop.watch(number, lambda: wrongly_called.append(True))

    for side in (first, second):
        loop.watch(side.fileno(), lambda side=side: replace_the_other(side))  # type: ignore[misc]
    for _, theirs in pairs:
        theirs.send(b"x")
    loop.run_once(wait=False)
    assert len(replacements) == 1
    assert not wrongly_called
    for side in (*pairs[0], *pairs[1], *replacements[0]):
        side.close()


def test_a_closed_peer_is_an_event(
    loop: EventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    heard: list[bytes] = []
    loop.watch(ours.fileno(), lambda: heard.append(ours.recv(1)))
    theirs.close()
    loop.run_once()
    assert heard == [b""]


# --- timers ----------------------------------------------------------------------------


def test_timers_come_in_the_order_of_their_time(loop: EventLoop) -> None:
    called: list[str] = []
    started = time.monotonic()
    loop.after(0.02, lambda: called.append("late"))
    loop.after(0.0, lambda: called.append("first"))
    loop.after(0.01, lambda: called.append("then"))
    loop.after(0.0, lambda: called.append("second"))
    while len(called) < 4:
        loop.run_once()
    assert called == ["first", "second", "then", "late"]
    assert 0.02 <= time.monotonic() - started < 5


def test_a_cancelled_timer_is_forgotten(loop: EventLoop) -> None:
    called: list[str] = []
    timer = loop.after(0.0, lambda: called.append("cancelled"))
    loop.after(0.01, lambda: called.append("kept"))
    timer.cancel()
    timer.cancel()
    loop.run_once()
    assert called == ["kept"]


def test_a_timer_may_set_another(loop: EventLoop) -> None:
    called: list[str] = []

    def first() -> None:
        called.append("first")
        loop.after(0.0, lambda: called.append("second"))

    loop.after(0.0, first)
    for _ in range(3):
        loop.run_once(wait=False)
    assert called == ["first", "second"]


def test_a_timer_is_not_waited_for_where_nothing_is(loop: EventLoop) -> None:
    called: list[bool] = []
    loop.after(30.0, lambda: called.append(True))
    started = time.monotonic()
    loop.run_once(wait=False)
    assert time.monotonic() - started < 5
    assert not called


def test_a_descriptor_interrupts_the_wait_for_a_timer(
    loop: EventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    called: list[bytes] = []
    loop.after(30.0, lambda: called.append(b"late"))
    loop.watch(pair[0].fileno(), lambda: called.append(pair[0].recv(1)))
    pair[1].send(b"x")
    started = time.monotonic()
    loop.run_once()
    assert called == [b"x"]
    assert time.monotonic() - started < 5


def test_a_duplicate_may_be_watched_for_something_else(
    loop: EventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    """As the parent does with its way to the supervisor."""
    ours = pair[0]
    duplicate = os.dup(ours.fileno())
    called: list[str] = []
    loop.watch(ours.fileno(), lambda: called.append("readable"))
    loop.watch(duplicate, lambda: called.append("writable"), WRITABLE)
    loop.run_once()
    assert called == ["writable"]
    loop.unwatch(duplicate)
    os.close(duplicate)
    loop.run_once(wait=False)
    assert called == ["writable"]


def test_cancelled_timers_are_not_kept_until_they_are_due(loop: EventLoop) -> None:
    called: list[int] = []
    for number in range(50_000):
        loop.after(86_400, lambda: None).cancel()
        if number % 10_000 == 0:
            loop.after(0, lambda number=number: called.append(number))
    assert len(loop._timers) <= 2_000
    loop.run_once(wait=False)
    assert called == [0, 10_000, 20_000, 30_000, 40_000]


def test_a_timer_that_has_called_can_be_cancelled(loop: EventLoop) -> None:
    timers = [loop.after(0, lambda: None) for _ in range(3_000)]
    loop.run_once(wait=False)
    for timer in timers:
        timer.cancel()
    assert loop._cancelled == 0
