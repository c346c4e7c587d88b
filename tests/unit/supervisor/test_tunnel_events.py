"""A tunnel that fails has one line a second in the log, and every failure is counted."""

import time
from typing import Any, cast

import pytest

from titus_py.between.event_loop import EventLoop
from titus_py.supervisor import tunnel_events
from titus_py.supervisor.metrics import Metrics
from titus_py.supervisor.record import Record
from titus_py.supervisor.tunnel_events import TunnelEvents


class Recorded:
    """A record whose log is a list."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def log(self, name: str, **fields: Any) -> None:
        self.lines.append((name, fields))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    monkeypatch.setattr(tunnel_events, "_SECONDS", 0.05)
    return Recorded()


@pytest.fixture
def loop() -> EventLoop:
    return EventLoop()


@pytest.fixture
def tell(loop: EventLoop, recorded: Recorded) -> TunnelEvents:
    return TunnelEvents(loop, cast(Record, recorded))


def failure(number: int, tunnel: str = "127.0.0.1:1") -> dict[str, Any]:
    return {"connection": number, "tunnel": tunnel, "end": "unreachable", "level": "info"}


def a_second_passes(loop: EventLoop) -> None:
    until = time.monotonic() + 0.1
    while time.monotonic() < until:
        loop.after(0.02, lambda: None)
        loop.run_once()


def test_the_first_is_told_at_once_and_the_rest_counted(
    loop: EventLoop, recorded: Recorded, tell: TunnelEvents
) -> None:
    for number in range(350):
        tell("tunnel_failed", 1, failure(number))
    ((name, first),) = recorded.lines
    assert (name, first["connection"], first["level"]) == ("tunnel_failed", 0, "error")
    a_second_passes(loop)
    ((_, last),) = recorded.lines[1:]
    assert (last["connection"], last["count"]) == (349, 349)
    assert recorded.metrics.tunnel_failures.counts["unreachable"] == 350
    assert recorded.metrics.accepted == 350


def test_what_begins_meanwhile_is_counted_alone(
    loop: EventLoop, recorded: Recorded, tell: TunnelEvents
) -> None:
    tell("tunnel_failed", 1, failure(1))
    tell("connection_begun", 1, {"connection": 2, "tunnel": "127.0.0.1:1"})
    tell("connection_begun", 1, {"connection": 3, "tunnel": "127.0.0.1:2"})
    assert [fields["connection"] for _, fields in recorded.lines] == [1, 3]
    a_second_passes(loop)
    tell("connection_begun", 1, {"connection": 4, "tunnel": "127.0.0.1:1"})
    assert [fields["connection"] for _, fields in recorded.lines] == [1, 3, 4]
    assert recorded.metrics.tunnels.counts == {"127.0.0.1:1": 2, "127.0.0.1:2": 1}


def test_each_tunnel_and_each_alarm_has_its_own(recorded: Recorded, tell: TunnelEvents) -> None:
    for tunnel in ("127.0.0.1:1", "127.0.0.1:2"):
        tell("tunnel_failed", 1, failure(1, tunnel))
        tell("tunnel_failed", 1, failure(2, tunnel) | {"level": "alarm"})
        tell("tunnel_failed", 1, failure(3, tunnel))
    assert [fields["connection"] for _, fields in recorded.lines] == [1, 2, 1, 2]
    assert recorded.metrics.alarms.counts["tunnel_failed"] == 2


def test_a_connection_that_the_server_turned_down_has_failed(
    recorded: Recorded, tell: TunnelEvents
) -> None:
    ended = {"tunnel": "127.0.0.1:1", "level": "info", "end": "server_protocol_error"}
    tell("connection_ended", 1, {**ended, "octets_to_client": 0})
    tell("connection_ended", 1, {**ended, "octets_to_client": 0})
    tell("connection_ended", 1, {**ended, "octets_to_client": 1})
    assert [fields["level"] for _, fields in recorded.lines] == ["error", "info"]
