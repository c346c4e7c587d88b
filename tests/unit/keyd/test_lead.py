"""One thread at a time has the lead. It makes way if others have had to wait for it."""

import select
import socket
import threading
from collections.abc import Iterator
from math import inf

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

    def hear(self) -> None:
        assert self.lead.next_event(0)
        self._receiver.recv(1)

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
        lead.make_way()
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
    other.join()
    assert taken == [False, True]
    assert lead.take(0)


def test_it_is_kept_while_nobody_has_to_wait(events: Events) -> None:
    assert events.lead.take(0)
    for _ in range(3):
        assert not events.lead.next_event(0)
        events.happen()
        events.hear()
        events.lead.make_way()
        assert events.lead.held


def test_it_is_not_kept_once_somebody_has_waited(
    events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    lead = events.lead
    assert lead.take(0)
    lead.make_way()
    assert lead.held
    events.happen()
    events.hear()
    lead.make_way()
    assert not is_held_beside(lead)
    # And is kept again after a while.
    assert lead.take(0)
    monkeypatch.setattr("time.monotonic", lambda: inf)
    lead.make_way()
    assert lead.held


def is_held_beside(lead: Lead) -> bool:
    """Once one who may wait for one more event has done so."""
    assert lead.held
    assert not lead.next_event(0)
    return lead.held


def test_who_has_made_way_waits_for_one_event_beside_the_leader(events: Events) -> None:
    lead = events.lead
    assert lead.take(0)
    lead.make_way()
    events.happen()
    events.hear()
    ready, go_on = threading.Event(), threading.Event()

    def lead_on() -> None:
        assert lead.take(60)
        ready.set()
        go_on.wait()
        lead.hand_over()

    leader = threading.Thread(target=lead_on)
    leader.start()
    # Each that takes long lets it wait once more, and wakes nobody.
    for _ in range(3):
        lead.make_way()
        ready.wait()
        assert lead.held
        events.happen()
        events.hear()
        assert not lead.held
    assert not lead.take(0)
    go_on.set()
    leader.join()
    assert lead.take(0)


def test_who_waits_while_nothing_takes_long_is_next_anyway(events: Events) -> None:
    lead = events.lead
    assert lead.take(0)
    events.happen()
    events.hear()
    lead.make_way()
    assert lead.held
