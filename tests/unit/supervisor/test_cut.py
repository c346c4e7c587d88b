"""Whom a reload no longer lets in, by what parents say of their clients."""

from typing import Any

import pytest

from titus_py.between.client_allow import Allow, Facts
from titus_py.between.client_identity import ClientTerms, Identity, Link
from titus_py.supervisor.cut import _Claim as Claim
from titus_py.supervisor.cut import _lets_in as lets_in
from titus_py.supervisor.cut import _Rules as Rules

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
