"""Connecting to the first of several addresses that answers (RFC 8305)."""

import gc
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import cast

import pytest
from integration.watches import without_watches

from titus_py.between.event_loop import EventLoop
from titus_py.between.plan import ResolvedAddress
from titus_py.parent.dialer import MAX_ATTEMPTS, Dialer

#: For what must not fail for want of time.
PATIENCE = 20.0

Outcome = tuple[socket.socket | None, str]


class Backend:
    """Listens on one address; ``fall_silent`` has it drop each SYN (tcp(7): a full queue)."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.socket(family, socket.SOCK_STREAM)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind((host, port))
        self.listener.listen(0)
        self.address: ResolvedAddress = (family, self.listener.getsockname())
        self._waiting: list[socket.socket] = []

    def fall_silent(self) -> "Backend":
        # The last of them is neither refused nor taken.
        for _ in range(4):
            waiting = socket.socket(self.listener.family, socket.SOCK_STREAM)
            waiting.setblocking(False)
            waiting.connect_ex(self.listener.getsockname())
            self._waiting.append(waiting)
        return self

    def speak_again(self) -> int:
        """Returns how many sockets are fewer for it."""
        for waiting in self._waiting:
            waiting.close()
        self.listener.setblocking(False)
        try:
            while True:
                self.listener.accept()[0].close()
        except BlockingIOError:
            return len(self._waiting)

    def close(self) -> None:
        for waiting in self._waiting:
            waiting.close()
        self.listener.close()


@pytest.fixture
def backends() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def silent(backends: ExitStack, host: str = "127.0.0.1") -> Backend:
    return backends.enter_context(closing(Backend(host).fall_silent()))


def speaking(backends: ExitStack, host: str = "127.0.0.1") -> Backend:
    return backends.enter_context(closing(Backend(host)))


def refusing(backends: ExitStack) -> ResolvedAddress:
    """Nothing listens there; it is bound, and so nobody else's."""
    bound = backends.enter_context(socket.socket())
    bound.bind(("127.0.0.1", 0))
    return socket.AF_INET, bound.getsockname()


def sockets() -> int:
    """How many this process has."""
    links = Path("/proc/self/fd").iterdir()
    return sum(link.is_socket() for link in links)


class Dial:
    """A dialer at work."""

    def __init__(
        self,
        addresses: Sequence[ResolvedAddress],
        timeout: float = PATIENCE,
        loop: EventLoop | None = None,
    ) -> None:
        self._loop = loop or EventLoop()
        self.outcomes: list[Outcome] = []
        self.most_sockets = 0
        # What other tests have left to the collector is closed now, and not while it is counted.
        gc.collect()
        self.others_sockets = sockets()
        self.dialer = Dialer(
            self._loop, addresses, timeout, 60, lambda *outcome: self.outcomes.append(outcome)
        )
        self.dialer.start()

    def count(self) -> int:
        """The dialer's sockets, what it has connected among them."""
        return sockets() - self.others_sockets

    def turn(self) -> None:
        self.most_sockets = max(self.most_sockets, self.count())
        self._loop.run_once()

    def outcome(self) -> Outcome:
        while not self.outcomes:
            self.turn()
        assert self.count() == (self.outcomes[0][0] is not None)
        assert len(self.outcomes) == 1
        return self.outcomes[0]

    def peer(self) -> object:
        connected, reason = self.outcome()
        assert connected is not None, reason
        with closing(connected):
            return connected.getpeername()


@pytest.mark.parametrize("dead", ["::1", "127.0.0.1"])
def test_an_address_that_drops_syns_does_not_cost_the_connection(
    backends: ExitStack, dead: str
) -> None:
    good = speaking(backends, "127.0.0.1" if dead == "::1" else "::1")
    dial = Dial([silent(backends, dead).address, good.address])
    assert dial.peer() == good.address[1]


def test_the_next_is_tried_at_once_where_one_refuses(backends: ExitStack) -> None:
    good = speaking(backends)
    dial = Dial([refusing(backends), refusing(backends), good.address], timeout=0.0)
    assert dial.peer() == good.address[1]


def test_one_that_was_first_and_is_late_still_wins(backends: ExitStack) -> None:
    """Its second SYN is answered, and nobody else's."""
    late = silent(backends)
    dial = Dial([late.address, *(silent(backends).address for _ in range(3))])
    while len(dial.dialer._attempts) < 4:
        dial.turn()
    dial.others_sockets -= late.speak_again()
    assert dial.peer() == late.address[1]


def test_attempts_go_on_beside_each_other_and_are_bounded(backends: ExitStack) -> None:
    good = speaking(backends)
    dead = [silent(backends).address for _ in range(MAX_ATTEMPTS + 2)]
    dial = Dial([*dead, good.address])
    assert dial.peer() == good.address[1]
    assert dial.most_sockets == MAX_ATTEMPTS


def test_every_failure_is_named_where_none_answers(backends: ExitStack) -> None:
    refuses = refusing(backends)
    dial = Dial([refuses, silent(backends).address, silent(backends).address], timeout=0.6)
    reason = f"127.0.0.1:{refuses[1][1]}: Connection refused; no answer in 0.6 s"
    assert dial.outcome() == (None, reason)


def test_an_attempt_that_cannot_be_watched_has_failed_here(backends: ExitStack) -> None:
    """For want of a watch: the next address may answer at once."""
    loop = EventLoop()
    addresses = [silent(backends).address, silent(backends).address]
    dial = without_watches(lambda: Dial(addresses, loop=loop), loop._epoll)
    reason = ("{}:{}: No space left on device".format(*address) for _, address in addresses)
    assert dial.outcome() == (None, "; ".join(reason))
    assert dial.dialer.failed_here


def test_no_address_is_no_connection() -> None:
    assert Dial([]).outcome() == (None, "no address")


def test_nothing_is_left_of_one_that_is_forgotten(backends: ExitStack) -> None:
    dial = Dial([silent(backends).address for _ in range(3)])
    while len(dial.dialer._attempts) < 3:
        dial.turn()
    dial.dialer.cancel()
    assert dial.count() == 0
    assert not dial.outcomes


def test_a_unix_socket_whose_queue_is_full_is_tried_less_and_less(
    backends: ExitStack, tmp_path: Path
) -> None:
    """A backend hangs, and hundreds wait for it: the parent has others to serve."""
    path = str(tmp_path / "backend")
    listener = backends.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(path)
    listener.listen(0)
    waiting = backends.enter_context(socket.socket(socket.AF_UNIX))
    waiting.connect(path)
    loop, found = EventLoop(), list[Outcome]()
    attempts = 0

    def count(_attempt: socket.SocketType, _address: object) -> str:
        nonlocal attempts
        attempts += 1
        return ""

    def done(connected: socket.SocketType | None, reason: str) -> None:
        found.append((cast(socket.socket | None, connected), reason))

    Dialer(loop, [(socket.AF_UNIX, path)], 2.0, 0.0, done, count).start()
    while not found:
        loop.run_once()
    assert found == [(None, "no answer in 2 s")]
    assert 2 <= attempts <= 10
    # It has room again.
    found.clear()
    Dialer(loop, [(socket.AF_UNIX, path)], PATIENCE, 0.0, done).start()
    listener.accept()[0].close()
    while not found:
        loop.run_once()
    ((connected, reason),) = found
    assert not reason
    assert connected is not None
    connected.close()
