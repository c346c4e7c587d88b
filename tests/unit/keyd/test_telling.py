"""What keyd tells its supervisor while that does not keep up: news is told later."""

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from keyd.telling import Teller


class Supervisor:
    def __init__(self) -> None:
        ours, self._end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self._end.setblocking(False)
        self.keyds = ours
        self.teller = Teller(ours)

    def stops(self) -> None:
        """Until nothing more can be told."""
        with suppress(BlockingIOError):
            while True:
                self.keyds.send(b'{"event": "alive"}', socket.MSG_DONTWAIT)

    def hears(self) -> list[dict[str, Any]]:
        """All but that keyd is alive."""
        told = []
        with suppress(BlockingIOError):
            while message := self._end.recv(1000):
                told.append(json.loads(message))
        return [one for one in told if one["event"] != "alive"]

    def close(self) -> None:
        self._end.close()


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    supervisor = Supervisor()
    yield supervisor
    supervisor.close()
    supervisor.keyds.close()


def test_news_is_told_once_there_is_room(supervisor: Supervisor) -> None:
    supervisor.stops()
    for state in ("ready", "cannot be used"):
        supervisor.teller.tell_news("tokens", tokens=[["web", state]])
        supervisor.teller.tell_news("upstreams", upstreams=[state])
    supervisor.teller.tell_kept()
    assert supervisor.hears() == []
    supervisor.teller.tell_kept()
    last = "cannot be used"
    assert supervisor.hears() == [
        {"event": "tokens", "tokens": [["web", last]]},
        {"event": "upstreams", "upstreams": [last]},
    ]
    supervisor.teller.tell_kept()
    assert supervisor.hears() == []


def test_what_was_kept_does_not_follow_what_is_newer(supervisor: Supervisor) -> None:
    supervisor.stops()
    supervisor.teller.tell_news("lent", clients=[1])
    supervisor.hears()
    supervisor.teller.tell_news("lent", clients=[2])
    supervisor.teller.tell_kept()
    assert supervisor.hears() == [{"event": "lent", "clients": [2]}]


def test_what_is_no_news_is_told_now_or_never(supervisor: Supervisor) -> None:
    supervisor.stops()
    assert not supervisor.teller.tell("lending_refused", count=1)
    supervisor.hears()
    supervisor.teller.tell_kept()
    assert supervisor.hears() == []


def test_lines_that_there_was_no_room_for_are_counted(supervisor: Supervisor) -> None:
    supervisor.teller.say("first")
    assert supervisor.hears() == [{"event": "keyd_said", "text": "first"}]
    supervisor.stops()
    for number in range(7):
        supervisor.teller.say(f"line {number}")
    supervisor.teller.tell_kept()
    assert supervisor.hears() == []
    for _ in range(2):
        supervisor.teller.tell_kept()
    told = {"event": "keyd_said", "text": "7 lines are lost: no room for them"}
    assert supervisor.hears() == [told]


class Ignoring(socket.socket):
    """Python says something while it sends, as of an exception that it ignores."""

    teller: Teller

    def send(self, *message: Any) -> int:
        sent = super().send(*message)
        if b" lost:" in message[0]:
            with suppress(BlockingIOError):
                while True:
                    super().send(b'{"event": "alive"}', socket.MSG_DONTWAIT)
            self.teller.say("ignored: something")
        return sent


def test_a_line_that_is_lost_while_others_are_told_of_is_counted(supervisor: Supervisor) -> None:
    with Ignoring(fileno=supervisor.keyds.detach()) as ignoring:
        ignoring.teller = supervisor.teller = Teller(ignoring)
        supervisor.keyds = ignoring
        supervisor.stops()
        for number in range(7):
            supervisor.teller.say(f"line {number}")
        supervisor.hears()
        for lost in (7, 1):
            supervisor.teller.tell_kept()
            told = {"event": "keyd_said", "text": f"{lost} lines are lost: no room for them"}
            assert supervisor.hears() == [told]


def test_what_is_too_long_is_said_once(supervisor: Supervisor) -> None:
    """net.core.wmem_default may be as low as this."""
    for _ in range(2):
        supervisor.teller.tell_news("lent", clients=["x" * 5000])
        supervisor.teller.tell_news("tokens", tokens=["short"])
        supervisor.teller.tell_kept()
    said = "lent: too long to be told: raise net.core.wmem_default (sysctl)"
    first, *others = supervisor.hears()
    assert first == {"event": "keyd_said", "text": said}
    assert others == [{"event": "tokens", "tokens": ["short"]}] * 2


def test_what_is_too_long_is_said_once_there_is_room(supervisor: Supervisor) -> None:
    supervisor.stops()
    supervisor.teller.tell_news("lent", clients=["x" * 5000])
    supervisor.teller.tell_kept()
    assert supervisor.hears() == []
    for _ in range(2):
        supervisor.teller.tell_kept()
    said = "lent: too long to be told: raise net.core.wmem_default (sysctl)"
    assert supervisor.hears() == [{"event": "keyd_said", "text": said}]


def test_one_that_has_ended_is_told_nothing(supervisor: Supervisor) -> None:
    supervisor.close()
    supervisor.teller.tell_news("lent", clients=[1])
    assert not supervisor.teller._kept
