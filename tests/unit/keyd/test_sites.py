"""Which virtual host a client's name selects: keyd's rule is the worker's."""

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from keyd.grants import GrantSets
from keyd.protocol import ANY_NAME, Grant, GrantSet, Malformed, Power
from keyd.sites import Sites
from titus_py.between.certificate_index import CertificateIndex, write
from titus_py.between.plan import Certificate
from titus_py.between.virtual_host import select

POWERS = frozenset({Power.SIGN_TLS13})
LABELS = st.text("abK", min_size=1, max_size=2)
HOSTS = st.lists(LABELS, min_size=1, max_size=3).map(".".join)
PATTERNS = st.one_of(st.just(""), HOSTS.map(str.lower), HOSTS.map(lambda host: f"*.{host.lower()}"))
VHOSTS = st.lists(st.one_of(st.none(), st.lists(PATTERNS, max_size=3).map(tuple)), max_size=4)
ASKED = st.one_of(
    st.none(), HOSTS, HOSTS.map(lambda host: f"{host}."), st.text("ab.*\N{KELVIN SIGN}", max_size=5)
)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def sites(vhosts: list[tuple[str, ...] | None]) -> Sites:
    """As the parent announces them."""
    made = Sites()
    for number, names in enumerate(vhosts):
        for name in (ANY_NAME,) if names is None else names:
            made.add(Grant(number, name, key(number), POWERS))
    return made


@given(VHOSTS, ASKED)
@example([("*.b",), ("a.b",)], "a.b")
@example([("a.b",), ("*.b",)], "A.B.")
@example([None, ("",)], None)
@example([("",), None], None)
@example([("a",), None], "*")
@example([("a",), None], ".")
@example([(), ("*.b",)], "*.b")
def test_the_rule_is_the_workers(vhosts: list[tuple[str, ...] | None], asked: str | None) -> None:
    chosen = select(vhosts, asked)
    expected = {} if chosen is None else {key(chosen): POWERS}
    assert sites(vhosts).select(asked) == expected


@given(st.lists(PATTERNS.filter(bool), unique=True, max_size=8), ASKED)
def test_a_directorys_certificate_is_the_one_that_is_shown(
    names: list[str], asked: str | None
) -> None:
    certificates = [Certificate("", "", key(number).hex()) for number in range(len(names))]
    descriptor = write(certificates, {name: number for number, name in enumerate(names)})
    shown = CertificateIndex(descriptor).find(asked)
    os.close(descriptor)
    made = Sites()
    for number, name in enumerate(names):
        made.add(Grant(3, name, key(number), POWERS))
    expected = {} if shown is None else {key(shown): POWERS}
    assert made.select(asked) == expected


def test_several_keys_of_one_virtual_host() -> None:
    made = Sites()
    for number in (1, 2):
        made.add(Grant(0, "a.test", key(number), POWERS))
    assert made.select("a.test") == {key(1): POWERS, key(2): POWERS}


def test_what_is_there_already_changes_nothing() -> None:
    made = sites([("a",), ("a", "b")])
    assert made.has(Grant(0, "a", key(0), POWERS))
    assert made.has(Grant(1, "a", key(1), POWERS)), "the first has that name"
    for other in (
        Grant(0, "b", key(0), POWERS),
        Grant(0, "a", key(1), POWERS),
        Grant(0, "a", key(0), frozenset({Power.DECRYPT})),
        Grant(0, "c", key(0), POWERS),
    ):
        assert not made.has(other)


def test_virtual_hosts_come_in_their_order() -> None:
    made = sites([(), ("a",)])
    with pytest.raises(Malformed, match="virtual host 0 after those for 1"):
        made.add(Grant(0, "a", key(0), POWERS))


AS_A_CLIENT = frozenset({Power.SIGN_TLS13_CLIENT})


def test_what_a_client_signs_is_for_whatever_its_server_is() -> None:
    """Nobody has seen a ClientHello: the worker makes it. The channel takes no witness."""
    sets = GrantSets()
    sets.add(GrantSet(7, (Grant(0, ANY_NAME, key(1), AS_A_CLIENT),)))
    sets.add(GrantSet(8, (Grant(0, ANY_NAME, key(2), POWERS),)))
    assert sets.use(7) == {key(1): AS_A_CLIENT}
    assert isinstance(sets.use(8), Sites)


@pytest.mark.parametrize(
    "grants",
    [
        [AS_A_CLIENT | POWERS],
        [AS_A_CLIENT, POWERS],
        [POWERS, AS_A_CLIENT],
        [AS_A_CLIENT | {Power.DECRYPT}],
    ],
)
def test_a_set_is_for_a_server_or_for_a_client(grants: list[frozenset[Power]]) -> None:
    with pytest.raises(Malformed, match="for a server and for a client"):
        GrantSets().add(GrantSet(0, tuple(Grant(0, ANY_NAME, key(1), powers) for powers in grants)))
