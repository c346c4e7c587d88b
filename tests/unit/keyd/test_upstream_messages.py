"""What two hosts' keyds say to each other: there and back, in any pieces, and nothing else."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyd.protocol import (
    MAX_CLIENT_HELLO_OCTETS,
    MAX_PAYLOAD_OCTETS,
    MAX_REPLY_PAYLOAD_OCTETS,
    MAX_REQUEST_IN_HANDSHAKE_OCTETS,
    Malformed,
    Operation,
    Power,
    Reply,
    Request,
    Status,
)
from keyd.upstream.messages import (
    MAX_DEADLINE_MS,
    MAX_FROM_BORROWER_OCTETS,
    MAX_FROM_LENDER_OCTETS,
    MAX_LENT_KEYS,
    Answer,
    Ask,
    Assembler,
    Greeting,
    decode_from_lender,
)

LENGTH_OCTETS = 4
keys = st.binary(min_size=32, max_size=32)
numbers = st.integers(0, 2**64 - 1)
payloads = st.binary(min_size=1, max_size=MAX_PAYLOAD_OCTETS)
requests = st.one_of(
    st.builds(
        Request, st.sampled_from(Operation), st.integers(0, 65535), keys, payloads, st.none()
    ),
    st.builds(
        Request,
        st.just(Operation.SIGN),
        st.integers(0, 65535),
        keys,
        payloads,
        st.binary(max_size=300),
    ),
)
greetings = st.builds(Greeting, st.frozensets(keys, max_size=20))
asks = st.builds(
    Ask,
    numbers,
    st.integers(0, MAX_DEADLINE_MS),
    st.frozensets(st.sampled_from(Power), min_size=1),
    st.binary(max_size=1000),
    requests,
)
answers = st.builds(
    Answer, numbers, st.builds(Reply, st.sampled_from(Status), st.binary(max_size=1000))
)


def in_pieces(stream: bytes, cuts: list[int], most: int) -> list[bytes]:
    """The messages of a stream that is cut at these places."""
    assembler = Assembler(most)
    messages = []
    places = sorted(cut % (len(stream) + 1) for cut in cuts)
    for start, end in zip([0, *places], [*places, len(stream)], strict=True):
        assembler.add(stream[start:end])
        messages += assembler.messages()
    return messages


@given(st.lists(st.one_of(greetings, answers), max_size=5), st.lists(st.integers(0), max_size=9))
def test_a_lenders_messages_in_any_pieces(said: list[Greeting | Answer], cuts: list[int]) -> None:
    stream = b"".join(message.encode() for message in said)
    messages = in_pieces(stream, cuts, MAX_FROM_LENDER_OCTETS)
    assert list(map(decode_from_lender, messages)) == said


@given(st.lists(asks, max_size=5), st.lists(st.integers(0), max_size=9))
def test_a_borrowers_messages_in_any_pieces(said: list[Ask], cuts: list[int]) -> None:
    stream = b"".join(message.encode() for message in said)
    messages = in_pieces(stream, cuts, MAX_FROM_BORROWER_OCTETS)
    assert list(map(Ask.decode, messages)) == said


@given(st.binary(max_size=200), st.lists(st.integers(0), max_size=9))
def test_rubbish_in_any_pieces(stream: bytes, cuts: list[int]) -> None:
    """It is refused, or waits to become a message; and how it is cut makes no difference."""
    try:
        messages = in_pieces(stream, cuts, MAX_FROM_BORROWER_OCTETS)
    except Malformed:
        with pytest.raises(Malformed):
            in_pieces(stream, [], MAX_FROM_BORROWER_OCTETS)
    else:
        assert messages == in_pieces(stream, [], MAX_FROM_BORROWER_OCTETS)


@given(st.one_of(st.binary(max_size=60), asks.map(Ask.encode)), st.lists(st.integers(0)))
def test_there_is_a_next_one_wherever_one_can_be_taken(stream: bytes, cuts: list[int]) -> None:
    """Or wherever taking it says what is wrong."""
    for end in {cut % (len(stream) + 1) for cut in cuts} | {len(stream)}:
        assembler = Assembler(MAX_FROM_BORROWER_OCTETS)
        assembler.add(stream[:end])
        expected = assembler.has_next()
        try:
            assert (assembler.next() is not None) == expected
        except Malformed:
            assert expected


@pytest.mark.parametrize("decode", [Ask.decode, Greeting.decode, decode_from_lender])
@given(st.binary(max_size=200))
def test_rubbish_is_a_message_or_is_refused(decode: object, rubbish: bytes) -> None:
    """What is taken is written as it came: there is one form for each message."""
    assert callable(decode)
    try:
        said = decode(rubbish)
    except Malformed:
        return
    if not isinstance(said, Greeting):  # whose keys may come in any order
        assert said.encode()[LENGTH_OCTETS:] == rubbish


@given(st.one_of(asks, greetings, answers), st.data())
def test_a_message_that_is_changed_is_another_one_or_none(
    said: Ask | Greeting | Answer, data: st.DataObject
) -> None:
    message = bytearray(said.encode()[LENGTH_OCTETS:])
    at = data.draw(st.integers(0, len(message) - 1))
    message[at] ^= data.draw(st.integers(1, 255))
    decode = Ask.decode if isinstance(said, Ask) else decode_from_lender
    with suppress(Malformed):
        assert decode(bytes(message)) != said


LONGEST_REQUEST = Request(
    Operation.SIGN,
    0x0403,
    bytes(32),
    bytes(MAX_PAYLOAD_OCTETS),
    bytes(MAX_REQUEST_IN_HANDSHAKE_OCTETS - MAX_PAYLOAD_OCTETS - 36 - 2),
)
LONGEST_ASK = Ask(
    1, 0, frozenset({Power.SIGN_TLS13}), bytes(MAX_CLIENT_HELLO_OCTETS), LONGEST_REQUEST
)


def test_the_longest_messages_fit() -> None:
    (message,) = in_pieces(LONGEST_ASK.encode(), [], MAX_FROM_BORROWER_OCTETS)
    assert len(message) == MAX_FROM_BORROWER_OCTETS
    assert Ask.decode(message) == LONGEST_ASK
    said = [
        Greeting(frozenset(number.to_bytes(32, "big") for number in range(MAX_LENT_KEYS))),
        Answer(1, Reply(Status.DONE, bytes(MAX_REPLY_PAYLOAD_OCTETS))),
    ]
    for one in said:
        (message,) = in_pieces(one.encode(), [], MAX_FROM_LENDER_OCTETS)
        assert decode_from_lender(message) == one


@pytest.mark.parametrize("length", [0, MAX_FROM_BORROWER_OCTETS + 1, 2**32 - 1])
def test_a_length_that_no_message_has(length: int) -> None:
    """It is refused before anything of the message has come."""
    assembler = Assembler(MAX_FROM_BORROWER_OCTETS)
    assembler.add(length.to_bytes(LENGTH_OCTETS, "big"))
    with pytest.raises(Malformed):
        next(assembler.messages())


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"A",
        b"G",
        b"G\2" + bytes(32),
        b"G\1" + bytes(31),
        b"G\1" + bytes(33),
        b"G\1" + bytes(32 * (MAX_LENT_KEYS + 1)),
        b"R" + bytes(7),
        b"R" + bytes(8) + b"\1",
        b"R" + bytes(8) + b"\2\0",
        b"R" + bytes(8) + b"\1\xff",
    ],
)
def test_what_no_lender_says(message: bytes) -> None:
    with pytest.raises(Malformed):
        decode_from_lender(message)


ASK = LONGEST_ASK._replace(client_hello=b"hello")


@pytest.mark.parametrize(
    "change",
    [
        {"deadline_ms": MAX_DEADLINE_MS + 1},
        {"powers": frozenset()},
        {"client_hello": bytes(MAX_CLIENT_HELLO_OCTETS + 1)},
    ],
)
def test_what_no_borrower_says(change: dict[str, object]) -> None:
    assert Ask.decode(ASK.encode()[LENGTH_OCTETS:]) == ASK
    with pytest.raises(Malformed):
        Ask.decode(ASK._replace(**change).encode()[LENGTH_OCTETS:])


def test_a_client_hello_that_is_longer_than_its_message() -> None:
    message = bytearray(ASK.encode()[LENGTH_OCTETS:])
    message[14:18] = len(message).to_bytes(4, "big")
    with pytest.raises(Malformed):
        Ask.decode(bytes(message))
