"""Whom a reload no longer lets in, by what parents say of their clients."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from titus_py.between.client_allow import Allow, Facts
from titus_py.between.client_identity import ClientTerms, Identity, Link
from titus_py.between.event_loop import EventLoop
from titus_py.between.known_client import KnownClient
from titus_py.supervisor import cut as module
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
    return lets_in(Claim(1, 1, rules, identity))


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
    assert not lets_in(Claim(1, 1, None, ALICE))
    assert not lets_in(Claim(1, 1, None, None))


class Orders:
    """What parents are told."""

    def __init__(self) -> None:
        self.given: list[dict[str, object]] = []

    def order(self, parent: object, order: dict[str, object]) -> None:
        self.given.append(order)


def generation(number: int) -> Generation:
    configuration = SimpleNamespace(tunnel=())
    double = SimpleNamespace(number=number, parent=object(), configuration=configuration)
    return cast(Generation, double)


class Asked:
    """A cut of one earlier generation's connections, whose parent this test plays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terms = ClientTerms(True, "", "", ((), (), (), (OWN.hex(),)))
        rules = Rules(terms, frozenset())
        monkeypatch.setattr(module, "_rules", lambda earlier, serving: {0: rules})
        self.loop, self.orders = EventLoop(), Orders()
        self.events: list[tuple[str, object]] = []
        self.outcomes: list[dict[str, object]] = []
        self.generation = generation(1)
        self.cut = Cut(
            self.loop,
            lambda name, of_generation=0, **fields: self.events.append((name, fields)),
            cast(Children, self.orders),
        )
        serving = generation(2)
        self.cut.begin(
            [self.generation, serving],
            lambda work, take: take(work()),
            self.outcomes.append,
        )
        assert self.orders.given == [{"do": "claims", "vhosts": [0]}]

    def say(self, *claims: tuple[int, Identity | None], count: int | None = None) -> None:
        said = [[number, 0, identity and identity.claim()] for number, identity in claims]
        self.cut.heard(self.generation, "claims", {"claims": said})
        told = len(claims) if count is None else count
        self.cut.heard(self.generation, "claims_told", {"count": told})


def test_whom_the_parent_is_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    stranger = ALICE._replace(facts=ALICE.facts._replace(spki="00" * 32))
    asked.say((7, ALICE), (8, stranger), (9, None))
    assert asked.orders.given[1:] == [{"do": "cut", "connections": [8, 9]}]
    assert asked.outcomes == [{"cut": 2}]
    assert asked.events == [("connections_cut", {"count": 2})]


def test_many_are_named_in_several_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    asked.say(*((number, None) for number in range(4500)))
    named = [cast(list[int], order["connections"]) for order in asked.orders.given[1:]]
    assert list(map(len, named)) == [*[200] * 22, 100]
    # Each fits into the smallest buffer (net.core.wmem_default), also after 10^18 connections.
    assert 200 * len(f"{10**18}, ") < 4500
    assert asked.outcomes == [{"cut": 4500}]


def test_what_a_parent_could_not_say_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its events may be lost: a cut that is not whole must not look like one that is."""
    asked = Asked(monkeypatch)
    asked.say((7, None), count=2)
    assert asked.outcomes == [{"not_cut": "1 connections are not known", "cut": 0}]
    asked.say((7, None))
    assert len(asked.outcomes) == 1


def test_a_parent_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CLAIMS_SECONDS", 0.01)
    asked = Asked(monkeypatch)
    while not asked.outcomes:
        asked.loop.run_once()
    assert "of generations 1 did not say which clients they serve" in str(
        asked.outcomes[0]["not_cut"]
    )


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
        return lets_in(Claim(1, 1, Rules(terms, frozenset(), (before, now)), ALICE))

    everywhere = frozenset({"a:1", "b:1"})
    for before, now, let_in in (
        (Reach((), everywhere), Reach((known(),), everywhere), True),
        (Reach((), everywhere), Reach((known("a:1"),), everywhere), False),
        (Reach((known("a:1"),), everywhere), Reach((known("a:1", "c:1"),), frozenset()), True),
        (Reach((known("a:1", "c:1"),), everywhere), Reach((known("a:1"),), frozenset()), False),
        (Reach((known("a:1"),), everywhere), Reach((known(),), frozenset({"b:1"})), False),
    ):
        assert judge(before, now) is let_in
