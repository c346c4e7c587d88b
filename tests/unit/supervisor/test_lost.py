"""A program that cannot be started: how often it is tried, who is told, when it is the end."""

from types import SimpleNamespace
from typing import Any

import pytest

from titus_py.supervisor.lost import Lost


class Supervisor:
    """Without a clock: what is to be done later is done when that time has come."""

    def __init__(self, parents: int) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self.said: list[str] = []
        self.ended = 0
        loop: Any = SimpleNamespace(after=self._after)
        service: Any = SimpleNamespace(give_up=self._give_up, tell_status=lambda: None)
        generations: Any = SimpleNamespace(parents=[None] * parents)
        self.lost = Lost(
            loop,
            lambda name, generation=0, **fields: self.said.append(name),
            service,
            generations,
            lambda: self.lost.settle("it fails"),
            clock=lambda: self.now,
        )

    def _give_up(self, why: str) -> None:
        assert why == "lost: keyd; it fails"
        self.ended += 1

    def _after(self, seconds: float, act: Any) -> Any:
        self.pauses.append(seconds)
        self.act = act
        return SimpleNamespace(cancel=lambda: None)

    def goes_on(self) -> None:
        self.now += self.pauses[-1]
        self.act()


@pytest.mark.parametrize("parents", [0, 1])
def test_it_is_tried_ever_more_seldom_and_told_of_once(parents: int) -> None:
    supervisor = Supervisor(parents)
    assert supervisor.lost.add("keyd", lambda: None)
    assert not supervisor.lost.add("keyd", lambda: None), "it is known already"
    supervisor.lost.settle("it fails")
    while len(supervisor.pauses) < 10 and not supervisor.ended:
        assert bool(supervisor.said) == (supervisor.now >= 10)
        supervisor.goes_on()
    if parents:
        assert supervisor.pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30]
        assert supervisor.said == ["program_broken"]
    else:
        assert supervisor.now == 31.5
        assert supervisor.said == ["program_broken", "giving_up"]


def test_what_waited_is_started_once_the_program_can_be() -> None:
    supervisor = Supervisor(1)
    started: list[str] = []
    for name in ("keyd", "resolver"):
        supervisor.lost.add(name, lambda name=name: started.append(name))  # type: ignore[misc]
    supervisor.lost.settle("it fails")
    assert (supervisor.lost.names, supervisor.lost.reason) == ("keyd and resolver", "it fails")
    supervisor.lost.settle("")
    assert started == ["keyd", "resolver"]
    assert (supervisor.lost.names, supervisor.lost.reason) == ("", "")
    supervisor.lost.add("keyd", lambda: None)
    supervisor.lost.settle("it fails")
    assert supervisor.pauses == [0.5, 0.5], "it begins anew"
