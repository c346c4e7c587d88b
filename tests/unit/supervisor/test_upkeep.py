"""What is remembered and logged of what children say is bounded."""

from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import pytest

from titus_py.between.event_loop import EventLoop
from titus_py.between.plan import State
from titus_py.supervisor.announced_audits import AnnouncedAudits
from titus_py.supervisor.backends import Backends
from titus_py.supervisor.child import Child
from titus_py.supervisor.child_events import Unintelligible
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.metrics import Metrics
from titus_py.supervisor.record import Record
from titus_py.supervisor.repeated_events import RepeatedEvents
from titus_py.supervisor.service import Service
from titus_py.supervisor.starting import Starting
from titus_py.supervisor.upkeep import Upkeep

NOBODY = cast(Child, None)


@pytest.fixture
def recorded() -> list[tuple[str, dict[str, Any]]]:
    return []


@pytest.fixture
def upkeep(recorded: list[tuple[str, dict[str, Any]]]) -> Upkeep:
    """Of nothing else than a record."""

    def event(name: str, of_generation: int = 0, **fields: Any) -> None:
        recorded.append((name, fields))

    nothing: Any = None
    record = cast(Record, SimpleNamespace(metrics=Metrics(), log=event))
    return Upkeep(
        EventLoop(),
        event,
        RepeatedEvents(EventLoop(), record),
        *[nothing] * 5,
        AnnouncedAudits(),
        *[nothing] * 7,
    )


def generation(connections: int) -> Generation:
    """With room for so many connections."""
    return cast(
        Generation,
        SimpleNamespace(
            number=1,
            connections={},
            ended=deque(),
            uids_needed=connections,
            checks=("one",),
            client_names=frozenset({"alice"}),
            retired=False,
            crippled=False,
            parent=None,
        ),
    )


def test_no_more_connections_are_remembered_than_there_can_be(upkeep: Upkeep) -> None:
    """The parent drops events that find no room: some ends may never be heard."""
    of = generation(connections=20)
    for number in range(1000):
        upkeep.heard(of, NOBODY, "connection_begun", {"connection": number, "uid": 1})
    assert list(of.connections) == list(range(980, 1000))


@pytest.mark.parametrize("name", ["client_known", "connection_ended", "limited"])
def test_a_client_that_nobody_has_named_is_not_counted(upkeep: Upkeep, name: str) -> None:
    """Thousands of long names would be in each answer to ``titus-py status``, and be too much."""
    of = generation(1)
    event = {"connection": 7, "end": "clean", "level": "warning", "limit": "client_rate"}
    upkeep.heard(of, NOBODY, name, event | {"client_name": "alice"})
    with pytest.raises(Unintelligible, match="does not name"):
        upkeep.heard(of, NOBODY, name, event | {"client_name": "mallory"})
    # A host that keys were not lent to: keyd's to say.
    refused = {"client_name": "mallory", "status": "stranger", "count": 1, "attempted": ""}
    upkeep.heard(of, cast(Child, object()), "lending_refused", refused)


def test_clients_without_a_worker_do_not_take_the_place_of_those_that_had_one(
    upkeep: Upkeep, recorded: list[tuple[str, dict[str, Any]]]
) -> None:
    """keyd may be heard after the end of a worker that it refused."""
    of = generation(1)
    of.ended.append({"connection": 7, "client": "192.0.2.1:1", "uid": 5})
    fields = {"level": "info", "client": "192.0.2.9:1", "end": "client_left"}
    upkeep.heard(of, NOBODY, "handshake_failed", {**fields, "connection": 8})
    assert [begun["connection"] for begun in of.ended] == [7]
    assert recorded == [("handshake_failed", {**fields, "connection": 8})]


def test_a_refusal_for_a_client_without_a_worker_is_recorded(
    upkeep: Upkeep, recorded: list[tuple[str, dict[str, Any]]]
) -> None:
    """An honest keyd refuses nothing to one; a keyd that was taken over may say so."""
    of = generation(1)
    of.ended.append({"connection": 7, "client": "192.0.2.1:1"})
    upkeep.heard(of, NOBODY, "keyd_refused", {"connection": 7, "level": "alarm"})
    [(name, fields)] = recorded
    assert (name, fields["client"], fields["uid"]) == ("keyd_refused", "192.0.2.1:1", None)


def test_keyd_does_not_fill_the_log(
    upkeep: Upkeep, recorded: list[tuple[str, dict[str, Any]]]
) -> None:
    for _ in range(1000):
        upkeep.heard(generation(1), NOBODY, "keyd_said", {"text": "again"})
    assert recorded == [("keyd_said", {"text": "again", "level": "error"})] * 10


def test_keyd_says_nothing_of_workers_that_stay(upkeep: Upkeep) -> None:
    """Both children say that they are alive; the parent, less often."""
    of = generation(1)
    of.spares = of.stay = 0
    upkeep.heard(of, NOBODY, "alive", {"spares": 4, "stay": 2})
    upkeep.heard(of, NOBODY, "alive", {})
    assert (of.spares, of.stay) == (4, 2)


def test_a_check_that_there_is_not_is_unintelligible(upkeep: Upkeep) -> None:
    with pytest.raises(Unintelligible):
        upkeep.heard(generation(1), NOBODY, "backend_up", {"check": 1, "since": 1.0})


def test_what_a_retired_parent_tells_late_is_not_how_a_backend_is(upkeep: Upkeep) -> None:
    """The parent after it has checked meanwhile."""
    known: list[tuple[object, State]] = []
    upkeep._backends = cast(Backends, SimpleNamespace(checked=lambda *found: known.append(found)))
    down = {"backend": "192.0.2.9:80", "check": 0, "since": 1.0, "reason": "refused"}
    serving, retired = generation(1), generation(1)
    retired.retired = True
    for of in (serving, retired):
        upkeep.heard(of, NOBODY, "backend_down", dict(down))
    assert known == [("one", State(False, 1.0, "refused"))]


def test_a_fork_server_dies_once(upkeep: Upkeep) -> None:
    """A parent that says so again and again does not have the supervisor give up."""
    failures: list[str] = []
    upkeep._starting = cast(
        Starting, SimpleNamespace(fail=lambda why, served: failures.append(why))
    )
    upkeep._service = cast(Service, SimpleNamespace(stops=0, exit_code=1))
    of = generation(1)
    for _ in range(3):
        upkeep.heard(of, NOBODY, "fork_server_died", {"level": "alarm", "how": "killed"})
    upkeep._loop.run_once()
    assert failures == ["the fork server died"]
