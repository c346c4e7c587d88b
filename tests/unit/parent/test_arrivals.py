"""Clients that come while there is room, while there is none, and when there is room again."""

import socket
from collections import deque
from contextlib import ExitStack
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from integration.watches import without_watches

from titus_py.between.event_loop import EventLoop
from titus_py.parent.arrival import Arrival
from titus_py.parent.arrivals import Arrivals


class Full:
    """A proxy that has room for one client. None of its connections can give way."""

    def __init__(self, stack: ExitStack) -> None:
        self.loop = EventLoop()
        self._stack = stack
        listener = socket.create_server(("127.0.0.1", 0))
        #: As another parent has it.
        self.same = stack.enter_context(listener.dup())
        self._address = listener.getsockname()
        listening = SimpleNamespace(
            descriptor=listener.detach(),
            accept_proxy_from=(),
            starttls=False,
            unix=False,
            tunnel=None,
        )
        plan: Any = SimpleNamespace(
            listeners=(listening,), tunnels=(), max_workers=1, handshake_timeout=60.0
        )
        #: For how many newcomers a connection was to give way, each time.
        self.asked: list[int] = []
        connections: Any = SimpleNamespace(
            busy={}, handshaking={}, give_way=self.asked.append, over=lambda *_: None
        )
        anybody: Any = SimpleNamespace(refuse=lambda _: None, leave=lambda _: None)
        backends: Any = None
        limits_hit: Any = None
        waiting: deque[Arrival] = deque()
        self.arrivals = Arrivals(
            self.loop,
            plan,
            waiting,
            connections,
            backends,
            anybody,
            limits_hit,
            lambda *_, **__: None,
        )
        stack.callback(self.arrivals.close)

    def come(self) -> socket.socket:
        return self._stack.enter_context(socket.create_connection(self._address))

    def run(self) -> None:
        self.arrivals.adjust(True)
        self.loop.after(0.01, lambda: None)
        self.loop.run_once()


def test_newcomers_are_heard_where_no_watch_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent would end, and each connection with it, for want of what it had a moment ago."""
    for seconds in ("_SILENCE_SECONDS", "_NOBODY_SECONDS"):
        monkeypatch.setattr(f"titus_py.parent.arrivals.{seconds}", 60.0)
    with ExitStack() as stack:
        full = Full(stack)

        def serve() -> None:
            first = full.come()
            while (accepted := full.arrivals.silent.newest()) is None:
                full.run()
            # There is no room: who comes is only noticed, and then, for a while, not even that.
            full.come()
            while not full.asked:
                full.run()
            assert full.asked == [1]
            full.arrivals.adjust(True)
            rounds = count()
            waits = [True]
            full.loop.after(0.2, waits.clear)
            while waits:
                full.loop.run_once()
                # Those that came before have left timers behind.
                assert next(rounds) < 100
            first.close()
            while full.arrivals.silent.newest() in (None, accepted):
                full.run()

        without_watches(serve, full.loop._epoll)


@pytest.mark.parametrize("may_accept", [True, False])
def test_a_listener_that_another_parent_has_shut_down_keeps_nobody_busy(may_accept: bool) -> None:
    """It has that parent's end in it, for good: accept(2) fails, and is tried now and then."""
    with ExitStack() as stack:
        full = Full(stack)
        full.same.shutdown(socket.SHUT_RDWR)
        rounds = count()
        waits = [True]
        full.loop.after(0.5, waits.clear)
        while waits:
            full.arrivals.adjust(may_accept)
            full.loop.run_once()
            assert next(rounds) < 100
