"""The parent's events, with a supervisor that is slow, or gone."""

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from titus_py.between.event_loop import EventLoop
from titus_py.parent.outbox import Outbox


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def hear_until(
    loop: EventLoop, supervisor: socket.socket, last: dict[str, object]
) -> list[dict[str, Any]]:
    """What comes, until this has."""
    heard: list[dict[str, Any]] = []
    while not heard or heard[-1] != last:
        try:
            heard.append(json.loads(supervisor.recv(65536, socket.MSG_DONTWAIT)))
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
