"""When a keyd is replaced that cannot connect to upstreams any more."""

from collections.abc import Callable
from typing import cast

from titus_py.between.event_loop import EventLoop
from titus_py.supervisor.crippled_keyd import CrippledKeyd


class Time:
    """A loop whose clock is the test's; ``replaced`` has when each generation was replaced."""

    def __init__(self) -> None:
        self.now = 10_000.0
        self.in_the_way = 0
        self.replaced: list[tuple[int, float]] = []
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self.crippled = CrippledKeyd(
            cast(EventLoop, self), self.replace, clock=lambda: self.now
        ).replace

    def after(self, seconds: float, callback: Callable[[], None]) -> None:
        self._timers.append((self.now + seconds, callback))

    def replace(self, over: Callable[[bool], None], urgently: int | None = None) -> None:
        assert urgently is not None
        self.in_the_way -= 1
        if self.in_the_way < 0:
            self.replaced.append((urgently, self.now - 10_000))
        over(self.in_the_way < 0)

    def run(self) -> None:
        while self._timers:
            self._timers.sort(key=lambda timer: timer[0])
            self.now, callback = self._timers.pop(0)
            callback()


def test_at_once_and_each_time_later_where_it_ends_again_and_again() -> None:
    time = Time()
    for generation in range(1, 8):
        time.crippled(generation)
        time.crippled(generation)
        time.run()
    assert time.replaced == [(1, 0), (2, 15), (3, 45), (4, 105), (5, 225), (6, 465), (7, 765)]
    time.now += 3600
    before = time.now
    time.crippled(8)
    time.run()
    assert time.now == before


def test_again_where_a_reload_is_in_the_way() -> None:
    time = Time()
    time.in_the_way = 3
    time.crippled(1)
    time.run()
    assert time.replaced == [(1, 14)]
