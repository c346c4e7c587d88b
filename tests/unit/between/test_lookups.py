"""What the supervisor and its resolver say to each other."""

import socket
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titus_py.between.lookups import MAX_ADDRESSES, MAX_OCTETS, Answer, Malformed, Question

FAMILIES = st.sampled_from([socket.AF_INET, socket.AF_INET6])
NUMBERS = st.integers(0, 2**32 - 1)
ERRORS = st.integers(-(2**31), 2**31 - 1).filter(bool)
#: As the name server may say.
ADDRESSES = {
    socket.AF_INET: st.tuples(st.ip_addresses(v=4).map(str), st.just(0)),
    socket.AF_INET6: st.tuples(st.ip_addresses(v=6), NUMBERS).map(
        lambda one: (socket.inet_ntop(socket.AF_INET6, one[0].packed), one[1])
    ),
}


@given(NUMBERS, FAMILIES, st.text(st.characters(max_codepoint=127), min_size=1, max_size=255))
def test_a_question_comes_back(number: int, family: int, name: str) -> None:
    question = Question(number, family, name)
    assert Question.decode(question.encode()) == question
    assert len(question.encode()) < MAX_OCTETS


@given(st.data(), NUMBERS, FAMILIES)
def test_an_answer_comes_back(data: st.DataObject, number: int, family: int) -> None:
    known = ADDRESSES[socket.AddressFamily(family)]
    addresses = data.draw(st.lists(known, min_size=1, max_size=MAX_ADDRESSES))
    answer = Answer(number, 0, tuple(addresses))
    octets = answer.encode(family)
    assert Answer.number_of(octets) == number
    assert Answer.decode(octets, family) == answer
    assert len(octets) < MAX_OCTETS


@given(NUMBERS, FAMILIES, ERRORS)
def test_an_error_comes_back(number: int, family: int, error: int) -> None:
    answer = Answer(number, error, ())
    assert Answer.decode(answer.encode(family), family) == answer


def test_more_addresses_than_are_used_are_left_out() -> None:
    many = tuple((str(IPv4Address(number)), 0) for number in range(500))
    octets = Answer(1, 0, many).encode(socket.AF_INET)
    assert Answer.decode(octets, socket.AF_INET).addresses == many[:MAX_ADDRESSES]


@given(st.binary(max_size=MAX_OCTETS + 20), FAMILIES)
def test_whatever_comes_is_addresses_or_malformed(octets: bytes, family: int) -> None:
    try:
        answer = Answer.decode(octets, family)
    except Malformed:
        return
    assert bool(answer.addresses) != bool(answer.error)
    assert len(answer.addresses) <= MAX_ADDRESSES
    kind = IPv4Address if family == socket.AF_INET else IPv6Address
    assert all(kind(host) for host, _ in answer.addresses if not kind(host).is_unspecified)
    assert answer.encode(family) == octets


@given(st.binary(max_size=300))
def test_whatever_is_asked_is_a_name_or_malformed(octets: bytes) -> None:
    try:
        question = Question.decode(octets)
    except Malformed:
        return
    assert question.encode() == octets


@pytest.mark.parametrize(
    "octets", [b"", b"R", bytes(8), bytes(9), bytes(7) + b"\1" + bytes(4), bytes(8 + 5 * 64 * 4)]
)
def test_what_is_no_answer(octets: bytes) -> None:
    with pytest.raises(Malformed):
        Answer.decode(octets, socket.AF_INET)
