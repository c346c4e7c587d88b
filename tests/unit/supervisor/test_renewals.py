"""When a fork server is replaced."""

import itertools
from collections.abc import Callable
from typing import Any, cast

from titus_py.between.event_loop import EventLoop
from titus_py.supervisor.renewals import Renewals

SEGV = "killed by SIGSEGV"
DAY = 86_400


class Replaced:
    """Counts the replacements; the clock is the test's."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.count = 0
        self.possible = True
        self.serving = 1
        self.said: list[dict[str, Any]] = []
        #: The timers that are set, by how long.
        self.timers: list[tuple[float, Any]] = []
        self.renewals = Renewals(
            cast(EventLoop, self), self.say, self.replace, clock=lambda: self.now
        )

    def after(self, seconds: float, callback: Any) -> None:
        if seconds:
            self.timers.append((seconds, callback))
        else:
            callback()

    def say(self, event: str, generation: int = 0, **fields: Any) -> None:
        self.said.append({"event": event, **fields})

    def replace(self, over: Callable[[bool], None], urgently: int | None = None) -> None:
        if urgently is not None and urgently != self.serving:
            return
        self.count += self.possible
        over(self.possible)

    def timer(self) -> float:
        """Fire the timer that was set last; returns after how long that would have been."""
        seconds, callback = self.timers.pop()
        callback()
        return seconds

    def die(self, times: int, end: str = SEGV, every: float = 1.0) -> int:
        for _ in range(times):
            self.now += every
            self.renewals.worker_ended(end, self.serving)
        return self.count


def test_three_within_a_minute() -> None:
    assert Replaced().die(2) == 0
    assert Replaced().die(3) == 1
    assert Replaced().die(30, every=31) == 0
    assert Replaced().die(3, every=29) == 1


def test_other_ends_do_not_count() -> None:
    for end in ("killed by SIGKILL", "exited with 70", "clean", "idle", "killed by SIGTERM"):
        assert Replaced().die(10, end) == 0


def test_the_pause_grows_to_five_minutes_and_an_hour_of_quiet_makes_it_short_again() -> None:
    found = Replaced()
    times = []
    for _ in range(3600):
        before = found.count
        if found.die(1) > before:
            times.append(found.now)
    pauses = [round(after - before) for before, after in itertools.pairwise(times)]
    assert pauses[:6] == [15, 30, 60, 120, 240, 300]
    assert set(pauses[6:]) == {300}
    found.now += 3700
    count = found.count
    assert found.die(3) == count + 1
    assert found.die(15) == count + 2


def test_what_was_not_possible_is_tried_again_soon() -> None:
    """A reload was in progress, which then failed."""
    found = Replaced()
    found.possible = False
    assert found.die(3) == 0
    assert found.timer() < 5
    assert not found.said
    found.possible = True
    assert found.timer() < 5
    assert found.count == 1
    assert len(found.said) == 1
    assert [seconds for seconds, _ in found.timers] == [DAY]


def test_what_a_reload_has_replaced_is_not_replaced_again() -> None:
    found = Replaced()
    found.possible = False
    assert found.die(3) == 0
    found.serving, found.possible = 2, True
    found.timer()
    assert (found.count, found.said) == (0, [])
    assert [seconds for seconds, _ in found.timers] == [DAY]


def test_what_fails_each_time_is_tried_ever_more_seldom() -> None:
    """No descriptor is left, say. An attacker decides how many bursts of crashes there are."""
    found = Replaced()
    found.possible = False
    found.die(3)
    for _ in range(20):
        found.die(3, every=19)
    daily, *urgent = found.timers
    assert len(urgent) == 1, "one attempt at a time, however many workers crash"
    pauses = [found.timer() for _ in range(10)]
    assert pauses == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    found.possible = True
    assert found.timer() == 300
    assert found.timers == [daily]
    # The next time it begins with the shortest pause again.
    found.possible, found.now = False, found.now + 3700
    found.die(3)
    assert found.timer() == 2


def test_crashes_of_another_generation_are_a_reason_of_their_own() -> None:
    found = Replaced()
    found.possible = False
    found.die(3)
    found.serving, found.now = 2, found.now + 3700
    found.die(3)
    found.possible = True
    while len(found.timers) > 1:
        found.timer()
    assert found.count == 1
    assert len(found.said) == 1


def test_once_a_day() -> None:
    found = Replaced()
    [(seconds, daily)] = found.timers
    assert seconds == DAY
    daily()
    assert found.count == 1
    assert found.said == [
        {"event": "fork_server_replaced", "level": "info", "reason": "once a day"}
    ]
    found.possible = False
    found.timers.pop()[1]()
    # It is tried again soon, and then ever more seldom: there may be no uids left for days.
    pauses = [found.timer() for _ in range(8)]
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    found.possible = True
    assert found.timer() == 3600
    assert found.timers[-1][0] == DAY
