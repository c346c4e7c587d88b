"""keyd's messages: out and back, and whatever else may come."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyd.protocol import (
    CONTROL_VERSION,
    KEY_ID_OCTETS,
    MAX_CLIENT_HELLO_OCTETS,
    MAX_CONTROL_OCTETS,
    MAX_KEYS,
    MAX_KEYS_OCTETS,
    MAX_PAYLOAD_OCTETS,
    MAX_REFUSAL_OCTETS,
    MAX_REPLY_OCTETS,
    MAX_REPLY_PAYLOAD_OCTETS,
    MAX_REQUEST_IN_HANDSHAKE_OCTETS,
    MAX_REQUEST_OCTETS,
    VERSION,
    Done,
    Grant,
    GrantSet,
    Keys,
    Malformed,
    Open,
    Operation,
    Power,
    Refusal,
    Reply,
    Request,
    Status,
)

KEY = bytes(range(KEY_ID_OCTETS))
keys = st.binary(min_size=KEY_ID_OCTETS, max_size=KEY_ID_OCTETS)
payloads = st.binary(max_size=MAX_PAYLOAD_OCTETS)
powers = st.frozensets(st.sampled_from(Power), min_size=1)

requests = st.builds(
    Request,
    st.sampled_from(Operation),
    st.integers(0, 65535),
    keys,
    st.binary(min_size=1, max_size=MAX_PAYLOAD_OCTETS),
    st.none(),
)
requests_in_handshakes = st.builds(
    Request,
    st.just(Operation.SIGN),
    st.integers(0, 65535),
    keys,
    st.binary(min_size=1, max_size=MAX_PAYLOAD_OCTETS),
    st.binary(max_size=300),
)
replies = st.builds(Reply, st.sampled_from(Status), payloads)
opens = st.builds(
    Open,
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 65535),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=1000),
)
names = st.text(st.characters(max_codepoint=127), max_size=255)
grant_sets = st.builds(
    GrantSet,
    st.integers(0, 2**32 - 1),
    st.lists(st.builds(Grant, st.integers(0, 2**32 - 1), names, keys, powers), max_size=20).map(
        tuple
    ),
)
refusals = st.builds(
    Refusal, st.integers(0, 2**63 - 1), st.sampled_from(Status), st.text(max_size=50)
)


dones = st.builds(Done, st.integers(0, 2**63 - 1), st.sampled_from(Operation))


# --- out and back ----------------------------------------------------------------------


@given(st.one_of(requests, requests_in_handshakes))
def test_a_request_comes_back(request: Request) -> None:
    assert Request.decode(request.encode()) == request


@given(replies)
def test_a_reply_comes_back(reply: Reply) -> None:
    assert Reply.decode(reply.encode()) == reply


@given(opens)
def test_an_open_comes_back(terms: Open) -> None:
    assert Open.decode(terms.encode()) == terms


@given(grant_sets)
def test_a_set_of_grants_comes_back(grants: GrantSet) -> None:
    (message,) = grants.encode()
    assert GrantSet.decode(message) == grants


@given(refusals)
def test_a_refusal_comes_back(refusal: Refusal) -> None:
    assert Refusal.decode(refusal.encode()) == refusal


def test_the_messages_of_a_handshake_may_be_so_long_and_no_longer() -> None:
    request = Request(Operation.SIGN, 0x0403, KEY, bytes(1024), bytes(192 * 1024))
    message = request.encode()
    assert len(message) == MAX_REQUEST_IN_HANDSHAKE_OCTETS
    assert Request.decode(message) == request
    for octets in (message + b"x", message[:1061], message[:37], message[:36]):
        with pytest.raises(Malformed):
            Request.decode(octets)


def test_a_connection_that_no_parent_has_is_malformed() -> None:
    """The supervisor would end a parent that told it of such a number."""
    with pytest.raises(Malformed, match="connection"):
        Refusal.decode(Refusal(2**63, Status.NOT_TLS, "").encode())


def test_a_long_refusal_is_cut_and_still_one() -> None:
    long = Refusal(1, Status.NOT_TLS, "é" * 300)
    assert len(long.encode()) == MAX_REFUSAL_OCTETS
    cut = Refusal.decode(long.encode())
    assert long.detail.startswith(cut.detail.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_the_messages_have_the_form_that_the_provider_speaks() -> None:
    """Octet for octet: keyd/provider/channel.c knows no other."""
    request = Request(Operation.SIGN, 0x0804, KEY, b"octets")
    assert request.encode() == b"\1\1\x08\x04" + KEY + b"octets"
    assert Request(Operation.DECRYPT, 0x0303, KEY, b"x").encode() == b"\1\2\3\3" + KEY + b"x"
    in_handshake = request._replace(messages=b"messages").encode()
    assert in_handshake == b"\1\3\x08\x04" + KEY + b"\0\6octetsmessages"
    assert Reply.decode(b"\1\0signature") == Reply(Status.DONE, b"signature")
    assert Reply.decode(b"\1\4") == Reply(Status.NOT_TLS)
    terms = Open(7, 10_000, 1, 9, b"hello").encode()
    assert terms == b"\5O" + bytes(7) + b"\7\0\0\x27\x10\0\1\0\0\0\x09hello"
    granted = Grant(2, "*.test", KEY, frozenset({Power.SIGN_TLS13, Power.DECRYPT}))
    (grants,) = GrantSet(9, (granted,)).encode()
    assert grants == b"\5G\0\0\0\x09\0\0\0\2\x18" + KEY + b"\6*.test"


# --- whatever else ---------------------------------------------------------------------


@given(st.binary(max_size=MAX_REQUEST_OCTETS + 1))
@pytest.mark.parametrize("kind", [Request, Reply, Open, GrantSet, Refusal, Done])
def test_any_octets_are_a_message_or_malformed(
    kind: type[Request | Reply | Open | GrantSet | Refusal | Done], octets: bytes
) -> None:
    heads = (b"", bytes((VERSION,)), bytes((CONTROL_VERSION,)) + b"O", b"\5G", b"\5R", b"\5D")
    for message in (head + octets for head in heads):
        try:
            decoded = kind.decode(message)
        except Malformed:
            continue
        if isinstance(decoded, Request | Reply):
            assert decoded.encode() == message


@given(requests, st.data())
def test_a_damaged_request_is_a_message_or_malformed(request: Request, data: st.DataObject) -> None:
    octets = bytearray(request.encode())
    octets[data.draw(st.integers(0, len(octets) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert Request.decode(bytes(octets)).encode() == octets
    except Malformed:
        return


def request(head: bytes = b"\1\1\0\0", payload: bytes = b"x") -> bytes:
    return head + KEY + payload


@pytest.mark.parametrize(
    ("octets", "reason"),
    [
        (b"", "a request of 0 octets"),
        (request(payload=b""), "a request of 36 octets"),
        (request(payload=bytes(MAX_PAYLOAD_OCTETS + 1)), "a request of 1061 octets"),
        (request(b"\0\1\0\0"), "a request of version 0"),
        (request(b"\2\1\0\0"), "a request of version 2"),
        (request(b"\1\0\0\0"), "a request for operation 0"),
        (request(b"\1\4\0\0"), "a request for operation 4"),
        (request(b"\1\3\0\0", b"\0"), "a request of 37 octets"),
        (request(b"\1\3\0\0", b"\0\0x"), "a request of 39 octets"),
        (request(b"\1\3\0\0", b"\0\2x"), "a request of 39 octets"),
        (request(b"\1\xff\0\0"), "a request for operation 255"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(octets: bytes, reason: str) -> None:
    with pytest.raises(Malformed) as caught:
        Request.decode(octets)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    "octets",
    [b"", b"\1", b"\2\0", b"\1\x09", b"\1\xff", b"\1\0" + bytes(MAX_REPLY_PAYLOAD_OCTETS + 1)],
)
def test_a_reply_that_is_none_is_malformed(octets: bytes) -> None:
    with pytest.raises(Malformed):
        Reply.decode(octets)


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        b"\5O" + bytes(17),
        b"\5O" + bytes(18 + MAX_CLIENT_HELLO_OCTETS + 1),
        b"\4O" + bytes(18),
        b"\5R" + bytes(18),
    ],
)
def test_an_open_that_is_none_is_malformed(octets: bytes) -> None:
    with pytest.raises(Malformed):
        Open.decode(octets)


def grant(mask: int = 2, name: bytes = b"\4name") -> bytes:
    return bytes(4) + bytes((mask,)) + KEY + name


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        b"\5G",
        b"\5G" + bytes(4) + grant()[:-1],
        b"\5G" + bytes(4) + grant() + bytes(37),
        b"\5G" + bytes(4) + grant(0),
        b"\5G" + bytes(4) + grant(1),
        b"\5G" + bytes(4) + grant(0xFF),
        b"\5G" + bytes(4) + grant(name=b"\2\xc3\xa4"),
        b"\4G" + bytes(4) + grant(),
        b"\5R" + bytes(4) + grant(),
        b"\5G" + bytes(4) + grant() * 4000,
    ],
)
def test_grants_that_are_none_are_malformed(octets: bytes) -> None:
    with pytest.raises(Malformed):
        GrantSet.decode(octets)


def test_the_longest_client_hello_fits_into_a_message() -> None:
    terms = Open(1, 2, 3, 4, bytes(MAX_CLIENT_HELLO_OCTETS))
    assert len(terms.encode()) == MAX_CONTROL_OCTETS
    assert Open.decode(terms.encode()) == terms


@pytest.mark.parametrize("count", [0, 1, 900, 901, 20_000])
def test_a_set_of_any_size_comes_in_messages_that_fit(count: int) -> None:
    granted = frozenset({Power.SIGN_TLS13})
    keys = [number.to_bytes(KEY_ID_OCTETS, "big") for number in range(count)]
    grants = tuple(Grant(7, "n" * 255, key, granted) for key in keys)
    messages = GrantSet(5, grants).encode()
    # Several of them fit into a socket's buffer.
    assert max(map(len, messages)) < 31_000
    decoded = [GrantSet.decode(message) for message in messages]
    assert {one.number for one in decoded} == {5}
    assert tuple(grant for one in decoded for grant in one.grants) == grants


def test_the_list_of_keys_has_room_for_all_of_them() -> None:
    keys = [number.to_bytes(KEY_ID_OCTETS, "little") for number in range(MAX_KEYS + 1)]
    octets = Keys.of(keys[:-1]).encode()
    assert len(octets) == MAX_KEYS_OCTETS
    assert Keys.decode(octets).keys == tuple(key[:8] for key in keys[:-1])
    with pytest.raises(Malformed, match="20001 keys in one keyd, and 20000 at most"):
        Keys.of(keys).encode()


@pytest.mark.parametrize("octets", [b"", b"\1K" + bytes(8), b"\3K" + bytes(7), b"\3O" + bytes(8)])
def test_a_list_of_keys_that_is_none_is_malformed(octets: bytes) -> None:
    """Also that of a keyd of an earlier version."""
    with pytest.raises(Malformed):
        Keys.decode(octets)


def test_the_longest_messages_fit_where_they_are_read() -> None:
    longest = Request(Operation.SIGN, 0, KEY, bytes(MAX_PAYLOAD_OCTETS))
    assert len(longest.encode()) == MAX_REQUEST_OCTETS
    assert len(Reply(Status.DONE, bytes(MAX_REPLY_PAYLOAD_OCTETS)).encode()) == MAX_REPLY_OCTETS


def test_keys_are_listed_while_others_come() -> None:
    class Slow(bytes):
        """While it is listed, another thread takes a key in."""

        def __getitem__(self, part: Any) -> Any:
            keys[bytes([len(keys)]) * 32] = None
            return bytes(self)[part]

    keys: dict[bytes, None] = {Slow(b"a" * 32): None, Slow(b"b" * 32): None}
    assert Keys.of(keys).keys == (b"a" * 8, b"b" * 8)
