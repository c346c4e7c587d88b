"""The message in which a worker says who its client is."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titus_py.between.client_allow import Facts
from titus_py.between.client_identity import (
    MAX_CERTIFICATE_OCTETS,
    MAX_IDENTITY_OCTETS,
    MAX_KNOWN,
    Identity,
    Link,
)
from titus_py.between.messages import Malformed

DIGESTS = st.binary(min_size=32, max_size=32)
NAMES = st.lists(st.text(max_size=30), max_size=4).map(tuple)
IDENTITIES = st.builds(
    Identity,
    st.builds(Facts, NAMES, NAMES, NAMES, DIGESTS.map(bytes.hex)),
    st.lists(
        st.builds(Link, DIGESTS, st.integers(0, 2**160 - 1), DIGESTS), min_size=1, max_size=8
    ).map(tuple),
    st.binary(max_size=200),
    st.booleans(),
    st.none() | st.integers(0, MAX_KNOWN - 1),
)
ONE = Identity(Facts(("a",), (), (), "00" * 32), (Link(bytes(32), 1, bytes(32)),), b"DER")


@given(IDENTITIES)
def test_it_is_understood(identity: Identity) -> None:
    assert Identity.decode(identity.encode()) == identity
    claim = json.loads(json.dumps(identity.claim()))
    assert Identity.from_claim(claim) == identity._replace(certificate=b"", known=None)


@pytest.mark.parametrize("serial", [-1, 2**160])
def test_a_serial_number_that_none_should_have_is_left_out(serial: int) -> None:
    strange = ONE._replace(links=(*ONE.links, Link(bytes(32), serial, bytes(32))))
    assert Identity.decode(strange.encode()) == ONE._replace(complete=False)


@given(st.binary(max_size=400))
def test_anything_else_is_malformed(octets: bytes) -> None:
    with pytest.raises(Malformed):
        Identity.decode(b"I" + octets)


@given(IDENTITIES, st.data())
def test_a_changed_message_is_understood_or_malformed(
    identity: Identity, data: st.DataObject
) -> None:
    octets = bytearray(identity.encode())
    octets[data.draw(st.integers(0, len(octets) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        again = Identity.decode(bytes(octets))
    except Malformed:
        return
    # Whatever is understood is what was sent: nothing is passed over.
    assert again.encode() == bytes(octets)


@pytest.mark.parametrize("change", [lambda octets: octets[:-1], lambda octets: octets + b"\0"])
def test_it_is_not_a_part_of_a_message(change: "type[bytes]") -> None:
    with pytest.raises(Malformed):
        Identity.decode(change(ONE.encode()))


def test_what_does_not_fit_is_left_out_and_said_to_be() -> None:
    names = tuple(f"{number}.example.org" for number in range(10_000))
    many_names = Identity.decode(ONE._replace(facts=ONE.facts._replace(dns=names)).encode())
    assert not many_names.complete
    assert set(many_names.facts.dns) < set(names)
    many_links = Identity.decode(ONE._replace(links=ONE.links * 9).encode())
    assert (len(many_links.links), many_links.complete) == (8, False)
    long_number = ONE._replace(links=(Link(bytes(32), 2**160, bytes(32)),))
    assert not Identity.decode(long_number.encode()).complete


def test_a_long_certificate_is_left_out() -> None:
    longest = ONE._replace(certificate=bytes(MAX_CERTIFICATE_OCTETS))
    assert Identity.decode(longest.encode()) == longest
    longer = ONE._replace(certificate=bytes(MAX_CERTIFICATE_OCTETS + 1))
    assert Identity.decode(longer.encode()) == ONE._replace(certificate=b"")


def test_no_message_is_longer_than_the_longest() -> None:
    names = tuple("x" * 100 for _ in range(1000))
    facts = Facts(names, names, names, "00" * 32)
    longest = Identity(facts, ONE.links * 8, bytes(MAX_CERTIFICATE_OCTETS))
    assert len(longest.encode()) <= MAX_IDENTITY_OCTETS
