"""What fails again and again has one line a second in the log, and every failure is counted."""

import time
from typing import Any, cast

import pytest

from titus_py.between.event_loop import EventLoop
from titus_py.supervisor import repeated_events
from titus_py.supervisor.metrics import Metrics
from titus_py.supervisor.record import Record
from titus_py.supervisor.repeated_events import RepeatedEvents


class Recorded:
    """A record whose log is a list."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def log(self, name: str, **fields: Any) -> None:
        self.lines.append((name, fields))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    monkeypatch.setattr(repeated_events, "_SECONDS", 0.05)
    return Recorded()


@pytest.fixture
def loop() -> EventLoop:
    return EventLoop()


@pytest.fixture
def events(loop: EventLoop, recorded: Recorded) -> RepeatedEvents:
    return RepeatedEvents(loop, cast(Record, recorded))


def failure(number: int, tunnel: str = "127.0.0.1:1") -> dict[str, Any]:
    return {"connection": number, "tunnel": tunnel, "end": "unreachable", "level": "info"}


def a_second_passes(loop: EventLoop) -> None:
    until = time.monotonic() + 0.1
    while time.monotonic() < until:
        loop.after(0.02, lambda: None)
        loop.run_once()


def test_the_first_is_told_at_once_and_the_rest_counted(
    loop: EventLoop, recorded: Recorded, events: RepeatedEvents
) -> None:
    for number in range(350):
        events.of_tunnel("tunnel_failed", 1, failure(number))
    ((name, first),) = recorded.lines
    assert (name, first["connection"], first["level"]) == ("tunnel_failed", 0, "error")
    a_second_passes(loop)
    ((_, last),) = recorded.lines[1:]
    assert (last["connection"], last["count"]) == (349, 349)
    assert recorded.metrics.tunnel_failures.counts["unreachable"] == 350
    assert recorded.metrics.accepted == 350


def test_what_begins_meanwhile_is_counted_alone(
    loop: EventLoop, recorded: Recorded, events: RepeatedEvents
) -> None:
    events.of_tunnel("tunnel_failed", 1, failure(1))
    events.of_tunnel("connection_begun", 1, {"connection": 2, "tunnel": "127.0.0.1:1"})
    events.of_tunnel("connection_begun", 1, {"connection": 3, "tunnel": "127.0.0.1:2"})
    assert [fields["connection"] for _, fields in recorded.lines] == [1, 3]
    a_second_passes(loop)
    events.of_tunnel("connection_begun", 1, {"connection": 4, "tunnel": "127.0.0.1:1"})
    assert [fields["connection"] for _, fields in recorded.lines] == [1, 3, 4]
    assert recorded.metrics.tunnels.counts == {"127.0.0.1:1": 2, "127.0.0.1:2": 1}


def test_each_tunnel_and_each_alarm_has_its_own(recorded: Recorded, events: RepeatedEvents) -> None:
    for tunnel in ("127.0.0.1:1", "127.0.0.1:2"):
        events.of_tunnel("tunnel_failed", 1, failure(1, tunnel))
        events.of_tunnel("tunnel_failed", 1, failure(2, tunnel) | {"level": "alarm"})
        events.of_tunnel("tunnel_failed", 1, failure(3, tunnel))
    assert [fields["connection"] for _, fields in recorded.lines] == [1, 2, 1, 2]
    assert recorded.metrics.alarms.counts["tunnel_failed"] == 2


def test_a_connection_that_the_server_turned_down_has_failed(
    recorded: Recorded, events: RepeatedEvents
) -> None:
    ended = {"tunnel": "127.0.0.1:1", "level": "info", "end": "server_protocol_error"}
    events.of_tunnel("connection_ended", 1, {**ended, "octets_to_client": 0})
    events.of_tunnel("connection_ended", 1, {**ended, "octets_to_client": 0})
    events.of_tunnel("connection_ended", 1, {**ended, "octets_to_client": 1})
    assert [fields["level"] for _, fields in recorded.lines] == ["error", "info"]


def refusal(number: int, attempted: str = "no channel", **fields: Any) -> dict[str, Any]:
    return {"connection": number, "status": "failed", "attempted": attempted, "level": "error"} | (
        fields
    )


def test_what_keyd_refuses_has_a_line_for_each_reason(
    loop: EventLoop, recorded: Recorded, events: RepeatedEvents
) -> None:
    for number in range(0, 300, 3):
        events.refused("keyd_refused", 1, refusal(number))
        events.refused("keyd_refused", 1, refusal(number + 1, "sign: no token"))
        unseen = refusal(number + 2, status="unwitnessed", level="warning")
        events.refused("keyd_refused", 1, unseen)
    assert [fields["connection"] for _, fields in recorded.lines] == [0, 1, 2]
    a_second_passes(loop)
    rest = [(fields["connection"], fields["count"]) for _, fields in recorded.lines[3:]]
    assert rest == [(297, 99), (298, 99), (299, 99)]


def test_reasons_that_are_made_up_are_told_together(
    loop: EventLoop, recorded: Recorded, events: RepeatedEvents
) -> None:
    for number in range(500):
        events.refused("keyd_refused", 1, refusal(number, f"reason {number}"))
    # Those that were told apart are so until the second is over.
    events.refused("keyd_refused", 1, refusal(500, "reason 7"))
    assert [fields["connection"] for _, fields in recorded.lines] == list(range(9))
    a_second_passes(loop)
    rest = [(fields["connection"], fields["count"]) for _, fields in recorded.lines[9:]]
    assert rest == [(500, 1), (499, 491)]


def test_what_is_worse_does_not_go_under_in_what_is_not(
    loop: EventLoop, recorded: Recorded, events: RepeatedEvents
) -> None:
    for number in range(20):
        events.refused("keyd_refused", 1, refusal(number, f"reason {number}", level="warning"))
    events.refused("keyd_refused", 1, refusal(20, "out of memory"))
    events.refused("keyd_refused", 1, refusal(21, "reason 21", level="warning"))
    a_second_passes(loop)
    assert 20 in [fields["connection"] for _, fields in recorded.lines]


def test_alarms_of_keyds_are_told_one_by_one_unless_there_is_a_flood(
    loop: EventLoop, recorded: Recorded, events: RepeatedEvents
) -> None:
    """Whoever controls keyd can have thousands in a second, each with another reason."""
    for number in range(350):
        events.refused("keyd_refused", 1, refusal(number, f"reason {number}", level="alarm"))
    # The first of the others is told at once, too.
    assert [fields["connection"] for _, fields in recorded.lines] == list(range(101))
    a_second_passes(loop)
    ((_, last),) = recorded.lines[101:]
    assert (last["connection"], last["level"], last["count"]) == (349, "alarm", 249)
    assert recorded.metrics.alarms.counts["keyd_refused"] == 350
    events.refused("keyd_refused", 1, refusal(350, level="alarm"))
    events.refused("keyd_refused", 1, refusal(351, level="alarm"))
    assert [fields["connection"] for _, fields in recorded.lines[102:]] == [350, 351]


def test_a_flood_of_one_keyd_hides_nothing_of_another_one(
    recorded: Recorded, events: RepeatedEvents
) -> None:
    for number in range(350):
        events.refused("keyd_refused", 1, refusal(number, level="alarm"))
        events.keyd_may_say_more(1)
    recorded.lines.clear()
    for number in range(3):
        events.refused("keyd_refused", 2, refusal(number, level="alarm"))
        assert events.keyd_may_say_more(2)
    assert [fields["connection"] for _, fields in recorded.lines] == [0, 1, 2]


def test_what_is_held_back_is_told_before_the_log_is_closed(
    loop: EventLoop, recorded: Recorded, events: RepeatedEvents
) -> None:
    for number in range(5):
        events.of_tunnel("tunnel_failed", 1, failure(number))
        events.refused("keyd_refused", 1, refusal(10 + number))
    events.of_tunnel("tunnel_failed", 1, failure(20, "127.0.0.1:2"))
    del recorded.lines[:]
    events.say_last()
    last = [(name, fields["connection"], fields["count"]) for name, fields in recorded.lines]
    assert last == [("tunnel_failed", 4, 4), ("keyd_refused", 14, 4)]
    # It goes on where the log is opened again: nothing is told twice.
    events.of_tunnel("tunnel_failed", 1, failure(30))
    a_second_passes(loop)
    rest = [(fields["connection"], fields["count"]) for _, fields in recorded.lines[2:]]
    assert rest == [(30, 1)]


def test_keyds_lines_are_counted_that_are_too_many(
    loop: EventLoop, recorded: Recorded, events: RepeatedEvents
) -> None:
    lost = "keyd_lines_lost"
    for _ in range(2):
        assert [events.keyd_may_say_more(1) for _ in range(12)] == [True] * 10 + [False] * 2
        assert recorded.lines == []
        a_second_passes(loop)
        assert recorded.lines == [(lost, {"level": "error", "count": 2, "generation": 1})]
        recorded.lines.clear()
    for _ in range(10):
        assert events.keyd_may_say_more(1)
    a_second_passes(loop)
    assert recorded.lines == []
    # The log is closed within a second, and opened again.
    for _ in range(13):
        events.keyd_may_say_more(1)
    events.say_last()
    events.say_last()
    assert not events.keyd_may_say_more(1)
    a_second_passes(loop)
    assert [fields["count"] for _, fields in recorded.lines] == [3, 1]
