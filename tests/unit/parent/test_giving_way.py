"""Which connection gives way, as the kernel knows real ones, and how often it is asked."""

import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from titus_py.between.messages import Ends
from titus_py.parent.giving_way import GivingWay
from titus_py.parent.sock_diag import Seen, SockDiag
from titus_py.parent.worker import Worker

#: No machine is so busy that it takes as long between one line of a test and the next.
IDLE_SECONDS = 1.0


class Full:
    """A proxy's connections, and for each the client's end."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.busy: dict[int, Worker] = {}
        self.handshaking: dict[int, Worker] = {}
        self.clients: dict[Worker, socket.socket] = {}
        self.choice = GivingWay(self.busy, self.handshaking, IDLE_SECONDS)

    def come(self, source: str) -> Worker:
        here = self._listener.getsockname()
        client = socket.create_connection(here, 10, (source, 0))
        server, (host, port) = self._listener.accept()
        worker = Worker(len(self.clients), -1, self._stack.enter_context(server))
        worker.address = host
        worker.endpoints = Ends(host, port, *here)
        self.busy[worker.uid] = worker
        self.clients[worker] = self._stack.enter_context(client)
        return worker


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[Full]:
    """Who has given way stays among them: whoever looks anew would choose it once more."""
    monkeypatch.setattr("titus_py.parent.giving_way._KEPT_SECONDS", 60.0)
    with ExitStack() as stack:
        yield Full(stack)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[Ends]:
    """How often the kernel was asked about each connection."""
    count: Counter[Ends] = Counter()
    look = SockDiag.look

    def counted(kernel: SockDiag, ends: Ends) -> Seen | None:
        count[ends] += 1
        return look(kernel, ends)

    monkeypatch.setattr(SockDiag, "look", counted)
    return count


def test_for_many_newcomers_the_kernel_is_asked_little(full: Full, asked: Counter[Ends]) -> None:
    workers = [full.come("127.1.1.1") for _ in range(30)]
    time.sleep(IDLE_SECONDS + 0.1)
    chosen = {full.choice.choose() for _ in range(30)}
    assert chosen == set(workers)
    # Once for all of them, and once more before each is ended.
    assert asked.total() <= 2 * len(workers)
    assert full.choice.choose() is None


def test_who_has_talked_since_or_ended_does_not_give_way(full: Full) -> None:
    workers = {full.come("127.1.1.1") for _ in range(5)}
    time.sleep(IDLE_SECONDS + 0.1)
    # From now on, it holds for how long the others have stood still.
    first = full.choice.choose()
    assert first is not None
    workers.remove(first)
    talks, ends, killed, left = workers
    full.clients[talks].send(b"x")
    del full.busy[ends.uid]
    killed.kill("for another reason")
    assert [full.choice.choose(), full.choice.choose()] == [left, None]


def test_if_all_talk_at_once_only_some_of_them_are_asked_about_again(
    full: Full, asked: Counter[Ends]
) -> None:
    for _ in range(50):
        full.come("127.1.1.1")
    time.sleep(IDLE_SECONDS + 0.1)
    assert full.choice.choose() is not None
    for client in full.clients.values():
        client.send(b"x")
    asked.clear()
    assert full.choice.choose() is None
    assert 0 < asked.total() <= 32


def test_it_is_of_the_network_that_has_most_now(full: Full) -> None:
    """As connections give way, another network has most."""
    workers = [full.come(f"127.1.{net}.1") for net in (1, 1, 1, 1, 2, 2, 3)]
    time.sleep(IDLE_SECONDS + 0.1)
    order = []
    for _ in workers:
        worker = full.choice.choose()
        assert worker is not None
        order.append(worker.address)
    assert order[:2] == ["127.1.1.1", "127.1.1.1"]
    assert sorted(order[2:4]) == ["127.1.1.1", "127.1.2.1"]
    assert sorted(order[4:]) == ["127.1.1.1", "127.1.2.1", "127.1.3.1"]


def test_a_connection_that_is_over_goes_first_and_a_handshake_never(full: Full) -> None:
    handshake, idle, over = (full.come("127.1.1.1") for _ in range(3))
    full.handshaking[handshake.uid] = handshake
    time.sleep(IDLE_SECONDS + 0.1)
    full.clients[over].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    full.clients[over].close()
    assert [full.choice.choose() for _ in range(3)] == [over, idle, None]
