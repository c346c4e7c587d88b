"""What a reload has a thread do, where the supervisor could not hear of its end."""

import os
from types import SimpleNamespace
from typing import Any

from integration.watches import without_watches

from titus_py.between.event_loop import EventLoop
from titus_py.supervisor.reload import Reload


def test_a_reload_that_no_watch_is_left_for_fails() -> None:
    """The supervisor would end, and so would all that it has started."""
    loop = EventLoop()
    problems: list[object] = []

    def event(name: str, of_generation: int = 0, **fields: Any) -> None:
        if name == "reload_failed":
            problems.append(fields["problem"])

    nothing: Any = None
    service: Any = SimpleNamespace(stops=0, reloading=True, end_reload=lambda: None)
    generations: Any = SimpleNamespace(serving=SimpleNamespace(crippled=False))
    starting: Any = SimpleNamespace()
    keyd_service: Any = SimpleNamespace(use_after_all=lambda _: None)
    reload = Reload(
        loop,
        event,
        service,
        *[nothing] * 3,
        generations,
        nothing,
        starting,
        keyd_service,
        *[nothing] * 4,
    )
    answers: list[dict[str, object]] = []
    reload.answers.append(answers.append)  # type: ignore[arg-type]
    before = len(os.listdir("/proc/self/fd"))
    done: list[int] = []
    without_watches(lambda: reload.aside(lambda: 1, done.append), loop._epoll)
    assert problems == ["it could not be read: No space left on device"]
    assert answers == [{"reloaded": False, "problems": problems}]
    assert len(os.listdir("/proc/self/fd")) == before
    reload.aside(lambda: 1, done.append)
    while not done:
        loop.run_once()
    assert done == [1]
