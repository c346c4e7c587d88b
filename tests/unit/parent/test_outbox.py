"""The parent's events, with a supervisor that is slow, or gone."""

import gc
import json
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from keyd.linux.descriptors import receive_descriptors
from titus_py.between.event_loop import EventLoop
from titus_py.parent.outbox import MAX_EVENTS, MAX_REPORTS, MESSAGE_OCTETS, Outbox


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def events_in(message: bytes) -> list[dict[str, Any]]:
    said = json.loads(message)
    return said if isinstance(said, list) else [said]


def hear_until(
    loop: EventLoop, supervisor: socket.socket, last: dict[str, object]
) -> list[dict[str, Any]]:
    """What comes, until this has."""
    heard: list[dict[str, Any]] = []
    while not heard or heard[-1] != last:
        try:
            heard += events_in(supervisor.recv(65536, socket.MSG_DONTWAIT))
        except BlockingIOError:
            loop.run_once()
    return heard


def test_a_flood_leaves_room_for_alarms(pair: tuple[socket.socket, socket.socket]) -> None:
    loop = EventLoop()
    outbox = Outbox(loop, pair[0])
    for number in range(15_000):
        outbox.put("ordinary", number=number)
    for number in range(500):
        outbox.put("alarming", level="alarm", number=number)
    last = {"event": "alarming", "level": "alarm", "number": 499}
    heard = hear_until(loop, pair[1], last)
    outbox.put("last")
    heard += hear_until(loop, pair[1], {"event": "last"})
    alarms = [event["number"] for event in heard if event["event"] == "alarming"]
    assert alarms == list(range(500))
    ordinary = [event["number"] for event in heard if event["event"] == "ordinary"]
    lost = sum(event["count"] for event in heard if event["event"] == "events_lost")
    assert lost > 0
    assert len(ordinary) + lost == 15_000
    assert ordinary == list(range(len(ordinary)))


def test_that_it_has_retired_always_has_room(pair: tuple[socket.socket, socket.socket]) -> None:
    """Whoever controls keyd has it raise as many alarms as there is room for."""
    loop = EventLoop()
    outbox = Outbox(loop, pair[0])
    for _ in range(15_000):
        outbox.put("alarming", level="alarm")
    outbox.put("retired")
    heard = hear_until(loop, pair[1], {"event": "retired"})
    alarms = [event for event in heard if event["event"] == "alarming"]
    lost = sum(event["count"] for event in heard if event["event"] == "events_lost")
    assert len(alarms) + lost == 15_000
    assert lost > 0


def test_alarms_are_bounded_as_well(pair: tuple[socket.socket, socket.socket]) -> None:
    outbox = Outbox(EventLoop(), pair[0])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(15_000):
        outbox.put("alarming", os.open(os.devnull, os.O_RDONLY), level="alarm")
    # Those that wait, those that were taken, and none that was lost.
    assert len(os.listdir("/proc/self/fd")) - before <= 11_000
    for _, report in outbox._waiting:
        if report is not None:
            os.close(report)


def test_a_supervisor_that_is_gone(pair: tuple[socket.socket, socket.socket]) -> None:
    outbox = Outbox(EventLoop(), pair[0])
    pair[1].close()
    outbox.put("one")
    outbox.put("two")
    outbox.send_last()


def test_the_longest_texts_are_one_message(pair: tuple[socket.socket, socket.socket]) -> None:
    """A worker decides how long its message is, which its parent quotes."""
    ours, theirs = pair
    outbox = Outbox(EventLoop(), ours)
    long = chr(0x1F510) * 30_000
    outbox.put("malformed_message", attempted=long, client=long, how=long, why=long, end=long)
    octets = theirs.recv(1 << 20)
    assert len(octets) <= 64 * 1024
    assert json.loads(octets)["attempted"] == long[:1000]


def test_what_is_ordinary_waits_for_others_and_for_nothing_else(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """The first end goes at once, and so does what is not ordinary, with all before it."""
    loop = EventLoop()
    outbox = Outbox(loop, pair[0])
    outbox.put("connection_over", level="info", connection=0)
    assert events_in(pair[1].recv(65536, socket.MSG_DONTWAIT))
    messages = []
    for number in range(1, 600):
        read, write = os.pipe()
        os.close(write)
        outbox.put("connection_over", read, level="info", connection=number)
        if number == 300:
            outbox.put("connection_over", level="warning", connection=number)
            # Some may have gone before, where this test was not given the processor.
            while not messages or b"warning" not in messages[-1]:
                messages.append(pair[1].recv(65536, socket.MSG_DONTWAIT))
    while b":599}" not in messages[-1]:
        loop.run_once()
        with suppress(BlockingIOError):
            while True:
                messages.append(pair[1].recv(65536, socket.MSG_DONTWAIT))
    heard = [event["connection"] for message in messages for event in events_in(message)]
    assert heard == [*range(1, 301), *range(300, 600)]
    assert len(messages) < len(heard) // 5
    assert all(len(events_in(message)) <= MAX_EVENTS for message in messages)


def test_a_beginning_waits_for_others_also_where_it_is_the_first(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    loop = EventLoop()
    outbox = Outbox(loop, pair[0])
    outbox.put("connection_begun", connection=1)
    with pytest.raises(BlockingIOError):
        pair[1].recv(65536, socket.MSG_DONTWAIT)
    outbox.put("connection_over", level="info", connection=1)
    both = ["connection_begun", "connection_over"]
    assert [event["event"] for event in events_in(pair[1].recv(65536))] == both
    # Whose end does not come is told of all the same.
    outbox.put("connection_begun", connection=2)
    heard = hear_until(loop, pair[1], {"event": "connection_begun", "connection": 2})
    assert len(heard) == 1


def test_each_report_comes_with_its_event(pair: tuple[socket.socket, socket.socket]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    outbox = Outbox(EventLoop(), pair[0])
    reports = []
    for number in range(2 * MAX_REPORTS):
        report = os.memfd_create("report")
        os.write(report, str(number).encode())
        outbox.put("connection_over", report, connection=number)
        outbox.put("connection_begun", connection=number)
    outbox.send_last()
    while len(reports) < 2 * MAX_REPORTS:
        message, descriptors = receive_descriptors(pair[1], 65536, MAX_REPORTS)
        over = [event for event in events_in(message) if event["event"] == "connection_over"]
        for event, descriptor in zip(over, descriptors, strict=True):
            assert os.pread(descriptor, 9, 0) == str(event["connection"]).encode()
            os.close(descriptor)
            reports.append(event["connection"])
    assert reports == list(range(2 * MAX_REPORTS))
    # The loop's own is left, perhaps.
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize("octets", [100, 900, 5000, 11_000])
def test_no_message_is_longer_than_the_supervisor_takes(
    pair: tuple[socket.socket, socket.socket], octets: int
) -> None:
    loop = EventLoop()
    outbox = Outbox(loop, pair[0])
    for number in range(30):
        names = {f"n{place}": "x" * 1000 for place in range(octets // 1000)}
        outbox.put("connection_begun", number=number, rest="x" * (octets % 1000), **names)
    heard = 0
    while heard < 30:
        try:
            message = pair[1].recv(1 << 20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            loop.run_once()
            continue
        assert len(message) <= 64 * 1024
        heard += len(events_in(message))


def test_a_socket_has_less_room_than_usual(pair: tuple[socket.socket, socket.socket]) -> None:
    """net.core.wmem_default may be as low as this. What fits is said, whatever comes with it."""
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    room = pair[0].getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    loop = EventLoop()
    outbox = Outbox(loop, pair[0])
    # What other tests have left to the collector is closed now, and not meanwhile.
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(200):
        outbox.put("connection_over", os.open(os.devnull, os.O_RDONLY), number=number)
    outbox.put("too long", os.open(os.devnull, os.O_RDONLY), claims=["x" * room])
    outbox.put("last")
    heard: list[dict[str, Any]] = []
    while not heard or heard[-1]["event"] != "last":
        try:
            message, reports = receive_descriptors(pair[1], 65536, 253, socket.MSG_DONTWAIT)
        except BlockingIOError:
            loop.run_once()
            continue
        assert len(message) < room
        for report in reports:
            os.close(report)
        heard += events_in(message)
    assert [event["number"] for event in heard[:-2]] == list(range(200))
    assert heard[-2:] == [
        {"event": "events_lost", "level": "error", "count": 1},
        {"event": "last"},
    ]
    assert len(os.listdir("/proc/self/fd")) == before


def test_where_there_is_less_room_texts_are_shorter(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """What a worker has attempted is no reason to lose the alarm."""
    ours, theirs = pair
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    outbox = Outbox(EventLoop(), ours)
    long = chr(0x1F510) * 1000
    for texts, left in ((3, 100), (10, 30)):
        said = dict.fromkeys("abcdefghij"[:texts], long)
        outbox.put("malformed_message", level="alarm", **said)
        (heard,) = events_in(theirs.recv(65536, socket.MSG_DONTWAIT))
        assert heard.pop("event") == "malformed_message"
        assert heard == {"level": "alarm"} | dict.fromkeys(said, long[:left])


def test_what_the_supervisor_could_not_receive_is_not_sent(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """It would take the beginning for nonsense, and end this process."""
    ours, theirs = pair
    outbox = Outbox(EventLoop(), ours)
    outbox.put("claims", claims=["x" * MESSAGE_OCTETS])
    outbox.put("last")
    assert events_in(theirs.recv(1 << 20, socket.MSG_DONTWAIT)) == [
        {"event": "events_lost", "level": "error", "count": 1},
        {"event": "last"},
    ]


def test_what_was_lost_last_is_told(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    outbox = Outbox(EventLoop(), ours)
    for _ in range(3):
        outbox.put("claims", claims=["x" * MESSAGE_OCTETS])
    outbox.send_last()
    lost = {"event": "events_lost", "level": "error", "count": 3}
    assert events_in(theirs.recv(65536, socket.MSG_DONTWAIT)) == [lost]
