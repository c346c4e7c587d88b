"""Whom a reload no longer lets in, by what parents say of their clients."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from types import SimpleNamespace
from typing import Any, cast

import pytest

from titus_py.between.client_allow import Allow, Facts
from titus_py.between.client_identity import ClientTerms, Identity, Link
from titus_py.between.event_loop import EventLoop
from titus_py.between.known_client import KnownClient
from titus_py.supervisor import cut as module
from titus_py.supervisor.child_events import Unintelligible
from titus_py.supervisor.children import Children
from titus_py.supervisor.cut import Cut
from titus_py.supervisor.cut import _Claim as Claim
from titus_py.supervisor.cut import _lets_in as lets_in
from titus_py.supervisor.cut import _Reach as Reach
from titus_py.supervisor.cut import _Rules as Rules
from titus_py.supervisor.generation import Generation

OWN, AUTHORITY = bytes([1]) * 32, bytes([2]) * 32
ALICE = Identity(
    Facts(("alice.example.org",), (), ("alice",), OWN.hex()),
    (Link(bytes(32), 1, OWN), Link(bytes(32), 2, AUTHORITY)),
    b"",
)


def judged(
    identity: Identity | None,
    allow: Allow | None = None,
    keys: tuple[bytes, ...] = (AUTHORITY,),
    **terms: Any,
) -> bool:
    settings = {"required": True, "authorities": "CA", "revocations": "", "allow": allow} | terms
    rules = Rules(ClientTerms(**settings), frozenset(key.hex() for key in keys))
    return lets_in(Claim(1, 1, rules, identity), rules)


@pytest.mark.parametrize(
    ("allow", "keys", "let_in"),
    [
        (None, (AUTHORITY,), True),
        (None, (OWN,), True),  # trusted itself
        (None, (bytes(32),), False),
        (Allow(dns=("*.example.org",)), (AUTHORITY,), True),
        (Allow(dns=("*.example.com",)), (AUTHORITY,), False),
        (Allow(spki=(OWN.hex(),)), (AUTHORITY,), True),
        (Allow(spki=(OWN.hex(),)), (bytes(32),), False),
        (Allow(spki=(AUTHORITY.hex(),)), (AUTHORITY,), False),
    ],
)
def test_a_certificate(allow: Allow | None, keys: tuple[bytes, ...], let_in: bool) -> None:
    assert judged(ALICE, allow, keys) is let_in


def test_keys_without_an_authority() -> None:
    for key, let_in in ((OWN, True), (AUTHORITY, False)):
        allow = Allow(spki=(key.hex(),))
        assert judged(ALICE, allow, (), authorities="") is let_in


def test_no_certificate() -> None:
    assert not judged(None)
    assert judged(None, required=False)


def test_what_cannot_be_judged_is_not_let_in() -> None:
    assert not judged(ALICE._replace(complete=False))
    claims = [Claim(1, 1, None, ALICE), Claim(1, 2, None, None)]
    assert module._unwanted(claims) == (claims, "")


@contextmanager
def smallest_buffer() -> Iterator[socket.socket]:
    """What is sent there is dropped."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, ThreadPoolExecutor(1) as thread:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        ours.settimeout(30)

        def drop() -> None:
            while theirs.recv(1):
                pass

        thread.submit(drop)
        yield ours
        ours.shutdown(socket.SHUT_WR)


class Orders:
    """What parents are told."""

    def __init__(self) -> None:
        self.given: list[dict[str, object]] = []

    def order(self, parent: object, order: dict[str, object]) -> None:
        self.given.append(order)


def generation(number: int, most: int = 10_000) -> Generation:
    configuration = SimpleNamespace(tunnel=(), worker=SimpleNamespace(max=most))
    double = SimpleNamespace(number=number, parent=object(), configuration=configuration)
    return cast(Generation, double)


class Asked:
    """A cut of earlier generations' connections, whose parents this test plays."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        vhosts: int = 1,
        most: int = 10_000,
        others: int = 0,
    ) -> None:
        terms = ClientTerms(True, "", "", ((), (), (), (OWN.hex(),)))
        rules = Rules(terms, frozenset())
        monkeypatch.setattr(module, "_rules", lambda *_: dict.fromkeys(range(vhosts), rules))
        self.loop, self.orders = EventLoop(), Orders()
        self.events: list[tuple[str, object]] = []
        self.outcomes: list[dict[str, object]] = []
        self.generation = generation(1, most)
        self.others = [generation(number) for number in range(2, 2 + others)]
        self.cut = Cut(
            self.loop,
            lambda name, of_generation=0, **fields: self.events.append((name, fields)),
            cast(Children, self.orders),
        )
        self.begin()
        order = self.asked[0]
        assert (order["do"], order["vhosts"]) == ("claims", list(range(vhosts))[:200])

    def begin(self) -> None:
        self.orders.given = []
        self.cut.begin(
            [self.generation, *self.others, generation(99)],
            lambda work, take: take(work()),
            self.outcomes.append,
        )
        self.asked, self.orders.given = self.orders.given, []
        self.begun = self.asked[-1]["asked"]

    def say(
        self,
        *claims: tuple[int, Identity | None],
        count: int | None = None,
        by: Generation | None = None,
        **answer: object,
    ) -> None:
        parent = by or self.generation
        said = [[number, 0, identity and identity.claim()] for number, identity in claims]
        self.cut.heard(parent, "claims", {"claims": said, **answer})
        told = len(claims) if count is None else count
        self.cut.heard(parent, "claims_told", {"count": told, **answer})


def test_whom_the_parent_is_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    stranger = ALICE._replace(facts=ALICE.facts._replace(spki="00" * 32))
    asked.say((7, ALICE), (8, stranger), (9, None))
    assert asked.orders.given == [{"do": "cut", "connections": [8, 9]}]
    assert asked.outcomes == [{"cut": 2}]
    assert asked.events == [("connections_cut", {"count": 2})]


def test_many_are_named_in_several_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    asked.say(*((number, None) for number in range(4500)))
    named = [cast(list[int], order["connections"]) for order in asked.orders.given]
    assert list(map(len, named)) == [*[200] * 22, 100]
    # Each fits into the smallest buffer, also after 10^18 connections.
    with smallest_buffer() as buffer:
        buffer.send(json.dumps({"do": "cut", "connections": [10**18] * 200}).encode())
    assert asked.outcomes == [{"cut": 4500}]


def test_many_virtual_hosts_are_asked_about_in_several_orders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """net.core.wmem_default may be small. It is not over before each was answered."""
    asked = Asked(monkeypatch, 20_000)
    vhosts = [cast(list[int], order["vhosts"]) for order in asked.asked]
    assert list(chain.from_iterable(vhosts)) == list(range(20_000))
    with smallest_buffer() as buffer:
        for order in asked.asked:
            buffer.send(json.dumps(order).encode())
    for number in range(len(vhosts)):
        assert not asked.outcomes
        asked.say((number, None))
    assert asked.outcomes == [{"cut": 100}]


def miscounted(told: int, known: int) -> str:
    said = f"counted {told} connections, and said who {known} of them are"
    return f"the parent of generation 1 has {said}"


def test_claims_are_missed_of_whichever_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, 600)
    asked.say((7, None), (8, None))
    asked.say((9, None), count=2)
    asked.say()
    assert asked.outcomes == [{"not_cut": miscounted(4, 3), "cut": 3}]


@pytest.mark.parametrize("first", [True, False])
def test_a_parent_that_miscounts_saves_no_others_clients(
    monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    asked = Asked(monkeypatch, others=1)
    (other,) = asked.others
    if not first:
        asked.say((7, None), (8, ALICE), by=other)
    asked.say((7, None), count=3)
    if first:
        asked.say((7, None), (8, ALICE), by=other)
    assert asked.orders.given == [{"do": "cut", "connections": [7]}] * 2
    assert asked.outcomes == [{"not_cut": miscounted(3, 1), "cut": 2}]
    events = [("connections_not_cut", {"level": "error", "reason": miscounted(3, 1), "count": 2})]
    assert asked.events == events


def test_a_parent_claims_no_more_connections_than_it_can_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Asked(monkeypatch, most=4)
    for numbers in ((1, 2), (3, 4)):
        said = [[number, 0, None] for number in numbers]
        asked.cut.heard(asked.generation, "claims", {"claims": said})
    with pytest.raises(Unintelligible, match="more connections than it can have"):
        asked.cut.heard(asked.generation, "claims", {"claims": [[4, 0, None]]})


def test_a_late_answer_is_none_to_the_next_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    before = asked.begun
    asked.begin()
    asked.say((7, None), asked=before)
    assert not asked.outcomes
    asked.say((7, None), (8, None), asked=asked.begun)
    assert asked.outcomes == [{"cut": 2}]


def test_tunnels_are_named_in_several_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    monkeypatch.setattr(module, "stricter_tunnels", lambda *_: list(range(450)))
    tunnels = [SimpleNamespace(listen=f"127.0.0.1:{number}") for number in range(450)]
    monkeypatch.setattr(asked.generation.configuration, "tunnel", tunnels)
    monkeypatch.setattr(asked.generation, "connections", {}, raising=False)
    asked.begin()
    named = [cast(list[int], order["tunnels"]) for order in asked.asked if "tunnels" in order]
    assert list(map(len, named)) == [200, 200, 50]
    assert list(chain.from_iterable(named)) == list(range(450))


def test_what_a_parent_could_not_say_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its events may be lost: a cut that is not whole must not look like one that is."""
    asked = Asked(monkeypatch)
    asked.say((7, None), count=2)
    assert asked.outcomes == [{"not_cut": miscounted(2, 1), "cut": 1}]
    asked.say((7, None))
    assert len(asked.outcomes) == 1


def test_a_parent_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients of the others are judged, and so is what it did say before that."""
    monkeypatch.setattr(module, "_CLAIMS_SECONDS", 0.01)
    asked = Asked(monkeypatch, others=1)
    (other,) = asked.others
    asked.say((7, None), (8, ALICE), by=other)
    asked.cut.heard(asked.generation, "claims", {"claims": [[9, 0, None]]})
    assert not asked.outcomes
    while not asked.outcomes:
        asked.loop.run_once()
    cuts = [order["connections"] for order in asked.orders.given]
    assert cuts == [[9], [7]]
    (outcome,) = asked.outcomes
    assert "of generations 1 did not say which clients they serve" in str(outcome["not_cut"])
    assert outcome["cut"] == 2


def test_a_parent_that_ends_has_no_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    asked.cut.gone(asked.generation)
    assert asked.outcomes == [{"cut": 0}]


def test_lists_that_cannot_be_read_are_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLIENT_AUTHORITIES", ("/nonexistent",))
    rules = Rules(ClientTerms(True, "CA", "CRL", None), frozenset([AUTHORITY.hex()]))
    unwanted, problem = module._unwanted([Claim(1, 1, rules, ALICE), Claim(1, 2, None, None)])
    assert [claim.connection for claim in unwanted] == [2]
    assert "could not be read" in problem


def test_a_client_that_may_reach_less_than_before() -> None:
    """Its connection may be with what it may not reach any more."""

    def known(*backend: str) -> KnownClient:
        return KnownClient("alice", Allow(spki=(OWN.hex(),)), backend, None, None)

    def judge(before: Reach, now: Reach) -> bool:
        terms = ClientTerms(True, "", "", ((), (), (), (OWN.hex(),)), now.known)
        rules = Rules(terms, frozenset(), (before, now))
        return lets_in(Claim(1, 1, rules, ALICE), rules)

    everywhere = frozenset({"a:1", "b:1"})
    for before, now, let_in in (
        (Reach((), everywhere), Reach((known(),), everywhere), True),
        (Reach((), everywhere), Reach((known("a:1"),), everywhere), False),
        (Reach((known("a:1"),), everywhere), Reach((known("a:1", "c:1"),), frozenset()), True),
        (Reach((known("a:1", "c:1"),), everywhere), Reach((known("a:1"),), frozenset()), False),
        (Reach((known("a:1"),), everywhere), Reach((known(),), frozenset({"b:1"})), False),
    ):
        assert judge(before, now) is let_in
