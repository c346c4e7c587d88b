"""A child that was started, and cannot be watched or told all, stands in nobody's way."""

import socket
import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from integration.watches import without_watches

from titus_py.between.event_loop import EventLoop, Timer
from titus_py.supervisor.child import Child
from titus_py.supervisor.children import Children
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.starting import Starting


class Noting(EventLoop):
    """Notes what is to be called later."""

    def __init__(self) -> None:
        super().__init__()
        self.later: list[Callable[[], None]] = []

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        self.later.append(callback)
        return Timer(callback)


class Restarted:
    """A generation whose keyd is to be started again; its children are processes that wait."""

    def __init__(self) -> None:
        self.loop = Noting()
        self.events: list[str] = []
        self.orders: list[dict[str, object]] = []
        self.children = Children(self.loop, self._event, lambda *_: None, lambda *_: None)
        self.started: list[Child] = []
        self.generation = cast(
            Generation,
            SimpleNamespace(
                retired=False,
                keyd=None,
                parent=SimpleNamespace(ready=1.0, queue=self._queue, send_orders=lambda: True),
                starting=set(),
                start_keyd=self._start_keyd,
            ),
        )
        service: Any = SimpleNamespace(ends=False)
        takeover: Any = SimpleNamespace(let_go=self._let_go)
        nothing: Any = None
        self.starting = Starting(
            self.loop,
            self._event,
            service,
            nothing,
            self.children,
            takeover,
            *[nothing] * 4,
            {},
        )

    def _event(self, name: str, of_generation: int = 0, **fields: Any) -> None:
        self.events.append(f"{name} {fields.get('reason')}")

    def _queue(self, order: dict[str, object], descriptors: list[int]) -> bool:
        self.orders.append(order)
        return True

    def _start_keyd(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        child = Child("keyd", subprocess.Popen(["sleep", "600"], stdin=theirs), ours)
        self.generation.keyd = child
        self.started.append(child)
        return theirs

    def _let_go(self, generation: Generation, child: Child) -> str:
        assert child is generation.keyd
        generation.keyd = None
        return self.children.let_go(child)


def test_a_child_that_cannot_be_watched_can_be_let_go() -> None:
    restarted = Restarted()
    restarted.generation.start_keyd().close()
    (child,) = restarted.started
    with pytest.raises(OSError, match="No space left"):
        without_watches(
            lambda: restarted.children.watch(restarted.generation, child), restarted.loop._epoll
        )
    child.kill()
    assert restarted.children.let_go(child) == "killed by SIGKILL"


def test_a_keyd_that_cannot_be_watched_is_replaced() -> None:
    """Nobody would hear that it is ready: new clients would wait for good."""
    restarted = Restarted()
    without_watches(
        lambda: restarted.starting.start_keyd_again(restarted.generation), restarted.loop._epoll
    )
    assert restarted.events == ["start_failed No space left on device"]
    assert restarted.generation.keyd is None
    assert not restarted.orders
    (again,) = restarted.loop.later
    again()
    assert restarted.orders == [{"do": "use keyd"}]
    _, child = restarted.started
    assert restarted.generation.keyd is child
    child.kill()
    assert restarted.children.let_go(child) == "killed by SIGKILL"


def test_a_child_of_the_previous_program_is_watched_in_the_end() -> None:
    """All connections are its parents'."""
    restarted = Restarted()
    restarted.generation.start_keyd().close()
    (child,) = restarted.started
    generation = cast(Generation, SimpleNamespace(children=[child], starting=set()))
    ended = []
    restarted.children._ended = lambda _, child: ended.append(restarted.children.let_go(child))
    without_watches(lambda: restarted.children.adopt(generation, child), restarted.loop._epoll)
    # It is not blamed that nobody listens, and that is told once.
    child.last_heard -= 3600
    restarted.children.look_after([generation])
    (again,) = restarted.loop.later
    without_watches(again, restarted.loop._epoll)
    assert restarted.events == ["start_failed keyd cannot be watched: No space left on device"]
    child.kill()
    (*_, again) = restarted.loop.later
    again()
    while not ended:
        restarted.loop.run_once()
    assert ended == ["killed by SIGKILL"]
    generation.children.clear()
    again()
    assert len(restarted.events) == 1
