"""Which certificates are let in by what is in them."""

import cProfile
import pstats

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titus_py.between.client_allow import Allow, Facts, allows, uri_matches
from titus_py.between.client_identity import MAX_NAMES_OCTETS
from titus_py.between.known_client import KnownClient, which

SPKI = "ab" * 32
NOBODY = Facts((), (), (), SPKI)
LABELS = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=10)
SEGMENTS = st.text(st.characters(exclude_characters="/*"), min_size=1, max_size=8).filter(
    lambda segment: segment not in (".", "..")
)


def dns_matches(pattern: str, name: str) -> bool:
    return allows(Allow(dns=(pattern,)), NOBODY._replace(dns=(name,)))


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("alice.example.org", "alice.example.org", True),
        ("alice.example.org", "ALICE.Example.ORG", True),
        ("alice.example.org", "bob.example.org", False),
        ("*.example.org", "alice.example.org", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", ".example.org", False),
        ("*.example.org", "a.b.example.org", False),
        ("*.example.org", "*.example.org", False),
        ("*.example.org", "a\0.example.org", False),
        ("*.example.org", "a b.example.org", False),
        ("*.example.org", "alice.example.org.", False),
        ("example.org", "", False),
        # str.lower() makes an ASCII letter of it.
        ("kelvin.example.org", "\u212aelvin.example.org", False),
    ],
)
def test_a_dns_name(pattern: str, name: str, fits: bool) -> None:
    assert dns_matches(pattern, name) is fits


@pytest.mark.parametrize(
    ("pattern", "uri", "fits"),
    [
        ("spiffe://x/a", "spiffe://x/a", True),
        ("spiffe://x/a", "spiffe://x/A", False),
        ("spiffe://x/a", "spiffe://x/a/", False),
        ("spiffe://x/*", "spiffe://x/a", True),
        ("spiffe://x/*", "spiffe://x/a/b", False),
        ("spiffe://x/*", "spiffe://x/", False),
        ("spiffe://x/*/web", "spiffe://x/prod/web", True),
        ("spiffe://x/*/web", "spiffe://x/prod/db", False),
        ("spiffe://x/**", "spiffe://x/a", True),
        ("spiffe://x/**", "spiffe://x/a/b/c", True),
        ("spiffe://x/**", "spiffe://x", False),
        ("spiffe://x/**", "spiffe://x/", False),
        ("spiffe://x/**", "spiffe://x.example/a", False),
        ("spiffe://x/**", "spiffe://x/../y", False),
        ("spiffe://x/a/**", "spiffe://x/b/a/c", False),
        ("urn:uuid:1", "urn:uuid:1", True),
    ],
)
def test_a_uri(pattern: str, uri: str, fits: bool) -> None:
    assert uri_matches(pattern, uri) is fits
    others = "spiffe://elsewhere/a", uri, "urn:b"
    assert allows(Allow(uri=("urn:a", pattern)), NOBODY._replace(uri=others)) is fits


#: As many as a worker can claim.
NAMES = tuple(f"x{number:03}" for number in range(MAX_NAMES_OCTETS // 8))


@pytest.mark.parametrize("kind", ["dns", "uri", "cn"])
def test_thousands_of_names_and_patterns_are_not_held_against_each_other(kind: str) -> None:
    """Who is taken over is not to have others' connections judged too late (``reload --cut``)."""
    facts = NOBODY._replace(**{kind: NAMES})
    head = "spiffe://" if kind == "uri" else ""
    patterns = tuple(f"{head}a{number}.example.org" for number in range(200))
    patterns += (f"*.{patterns[0]}",) if kind == "dns" else (f"{head}b/*",)
    clients = [KnownClient("", Allow(**{kind: (one,)}), (), None, None) for one in patterns]
    with cProfile.Profile() as profile:
        assert not allows(Allow(**{kind: patterns}), facts)
        assert which(clients, facts) is None
    assert pstats.Stats(profile).total_calls < 10 * (len(NAMES) + len(patterns))  # type: ignore[attr-defined]


def test_any_one_match_suffices() -> None:
    facts = Facts(("a.example.org",), ("spiffe://x/a",), ("alice",), SPKI)
    for allow in (
        Allow(dns=("*.example.org",)),
        Allow(uri=("spiffe://x/*",)),
        Allow(cn=("bob", "alice")),
        Allow(spki=(SPKI,)),
        Allow(dns=("other.example.org",), cn=("alice",)),
    ):
        assert allows(allow, facts)
        assert not allows(allow, NOBODY._replace(spki="00" * 32))
    assert not allows(Allow(), facts)


def test_a_name_counts_only_as_what_it_is() -> None:
    """A common name that looks like a host name is none, and the other way round."""
    assert not allows(Allow(dns=("alice",)), NOBODY._replace(cn=("alice",)))
    assert not allows(Allow(cn=("alice",)), NOBODY._replace(dns=("alice",)))
    assert not allows(Allow(cn=("*",)), NOBODY._replace(cn=("alice",)))


def test_all_is_everybody() -> None:
    assert allows(None, NOBODY)


@given(LABELS, st.lists(LABELS, min_size=1, max_size=3).map(".".join))
def test_a_star_is_exactly_one_label(label: str, domain: str) -> None:
    assert dns_matches(f"*.{domain}", f"{label}.{domain}")
    assert not dns_matches(f"*.{domain}", domain)
    assert not dns_matches(f"*.{domain}", f"{label}.{label}.{domain}")
    assert dns_matches(domain, domain)


@given(st.lists(SEGMENTS, min_size=1, max_size=4), st.integers(0, 3))
def test_stars_are_whole_segments(segments: list[str], number: int) -> None:
    uri = "spiffe://x/" + "/".join(segments)
    assert uri_matches(uri, uri)
    assert uri_matches("spiffe://x/**", uri)
    assert uri_matches("spiffe://x" + "/*" * len(segments), uri)
    assert not uri_matches("spiffe://x" + "/*" * (len(segments) + 1), uri)
    assert not uri_matches("spiffe://y/**", uri)
    starred = [*segments]
    starred[number % len(segments)] = "*"
    assert uri_matches("spiffe://x/" + "/".join(starred), uri)


@given(st.text(max_size=40), st.text(max_size=40))
def test_whatever_is_in_a_certificate_is_judged(pattern: str, name: str) -> None:
    assert dns_matches(pattern, name) in (True, False)
    assert uri_matches(pattern, name) in (True, False)
    assert allows(Allow(cn=(pattern,)), NOBODY._replace(cn=(name,))) is (pattern == name)
