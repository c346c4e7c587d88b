"""One thread at a time has the lead, and only whoever has it hands it over."""

import select
import socket
import threading
from collections.abc import Iterator

import pytest

from keyd.lead import Lead


class Events:
    """What the leader waits for, and the lead."""

    def __init__(self) -> None:
        self._sender, self._receiver = socket.socketpair()
        self._epoll = select.epoll()
        self._epoll.register(self._receiver, select.EPOLLIN)
        self.lead = Lead(self._epoll)

    def happen(self) -> None:
        self._sender.send(b"1")

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()
        self._epoll.close()


@pytest.fixture
def events() -> Iterator[Events]:
    made = Events()
    yield made
    made.close()


def test_one_has_it_until_it_is_handed_over(events: Events) -> None:
    lead = events.lead
    assert not lead.held
    assert lead.take(0)
    assert lead.held
    taken: list[bool] = []

    def take() -> None:
        assert not lead.held
        lead.hand_over()
        taken.append(lead.take(0))
        taken.append(lead.take(60) and lead.held)
        lead.hand_over()

    other = threading.Thread(target=take)
    other.start()
    while not taken:
        pass
    assert taken == [False]
    lead.hand_over()
    assert not lead.held
    events.happen()
    other.join()
    assert taken == [False, True]
    assert lead.take(0)


def test_an_event_that_is_there_already_wakes_another_one(events: Events) -> None:
    lead = events.lead
    assert lead.take(0)
    events.happen()
    woken: list[bool] = []
    other = threading.Thread(target=lambda: woken.append(lead.take(60)))
    other.start()
    lead.hand_over()
    other.join()
    assert woken == [True]


def test_nobody_is_woken_for_events_that_the_leader_hears(events: Events) -> None:
    lead = events.lead
    assert lead.take(0)
    lead.hand_over()
    assert not lead._vacancy.poll(0)
    assert lead.take(0)
    events.happen()
    assert not lead._vacancy.poll(0)


@pytest.mark.parametrize("again", range(20))
def test_no_event_is_missed(events: Events, again: int) -> None:
    """Whoever takes over and hands over again, in whatever order."""
    heard = threading.Semaphore(0)
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            if events.lead.take(60):
                if events._epoll.poll(60, 1):
                    events._receiver.recv(1)
                    heard.release()
                events.lead.hand_over()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        events.happen()
        assert heard.acquire(timeout=20)
    over.set()
    for _ in threads:
        events.happen()
    for thread in threads:
        thread.join()
