"""The ClientHello that a worker reads: OpenSSL's, everybody's, and what is none."""

import contextlib
import ssl
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from OpenSSL import SSL

from titus_py.worker import client_hello
from titus_py.worker.client_hello import (
    MAX_MESSAGE_OCTETS,
    MAX_RECORDS,
    Alert,
    ClientHello,
    ClientHelloReader,
    InvalidClientHello,
    fatal_alert,
    offered_protocols,
)


def recorded(server_name: str | None, newest: int = SSL.TLS1_3_VERSION) -> bytes:
    """What the OpenSSL of ``cryptography`` sends first."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_max_proto_version(newest)
    connection = SSL.Connection(context, None)
    connection.set_connect_state()
    if server_name is not None:
        connection.set_tlsext_host_name(server_name.encode())
    with contextlib.suppress(SSL.WantReadError):
        connection.do_handshake()
    return connection.bio_read(65536)


def recorded_by_the_system(server_name: str | None) -> bytes:
    """What the OpenSSL of Python's own ssl module sends first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.set_alpn_protocols(["h2", "http/1.1"])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=server_name)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


RECORDED = [
    (name, hello)
    for name in ("www.example.org", None)
    for hello in (
        recorded(name),
        recorded(name, SSL.TLS1_2_VERSION),
        recorded_by_the_system(name),
    )
]


def record(content: bytes, kind: int = 22, version: bytes = b"\3\1") -> bytes:
    return bytes((kind,)) + version + len(content).to_bytes(2, "big") + content


def vector(length_octets: int, content: bytes) -> bytes:
    return len(content).to_bytes(length_octets, "big") + content


def message(extensions: bytes | None, body: bytes | None = None) -> bytes:
    """A ClientHello with these extensions, put together by hand."""
    if body is None:
        body = b"\3\3" + bytes(32) + vector(1, b"") + vector(2, b"\x13\1") + vector(1, b"\0")
        body += b"" if extensions is None else vector(2, extensions)
    return b"\1" + vector(3, body)


def with_name(name: bytes, kind: int = 0) -> bytes:
    names = vector(2, bytes((kind,)) + vector(2, name))
    return record(message(b"\0\0" + vector(2, names)))


def read(octets: bytes) -> ClientHello | None:
    """All of it at once."""
    return ClientHelloReader().feed(octets)


def name_in(hello: ClientHello | None) -> str | None:
    assert hello is not None
    return hello.server_name


def read_whole(octets: bytes) -> ClientHello:
    hello = read(octets)
    assert hello is not None
    return hello


def refusal_of(octets: bytes) -> InvalidClientHello:
    with pytest.raises(InvalidClientHello) as caught:
        read(octets)
    return caught.value


def is_incomplete(octets: bytes) -> bool:
    return read(octets) is None


def cut(octets: bytes, data: st.DataObject) -> list[bytes]:
    """In pieces of any size."""
    cuts = data.draw(st.lists(st.integers(1, max(1, len(octets) - 1)), unique=True).map(sorted))
    return [octets[start:end] for start, end in pairwise([0, *cuts, len(octets)])]


# --- real ones -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "hello"), RECORDED)
def test_a_recorded_client_hello_gives_its_name(name: str | None, hello: bytes) -> None:
    assert name_in(read(hello)) == name


@pytest.mark.parametrize(("name", "hello"), RECORDED)
def test_until_its_last_octet_a_client_hello_is_incomplete(name: str | None, hello: bytes) -> None:
    assert all(is_incomplete(hello[:length]) for length in range(len(hello)))


@given(recorded=st.sampled_from(RECORDED), data=st.data())
def test_a_client_hello_may_come_in_any_pieces(
    recorded: tuple[str | None, bytes], data: st.DataObject
) -> None:
    name, hello = recorded
    *pieces, last = cut(hello, data)
    reader = ClientHelloReader()
    assert [reader.feed(piece) for piece in pieces] == [None] * len(pieces)
    assert name_in(reader.feed(last)) == name


def test_a_client_hello_may_come_an_octet_at_a_time() -> None:
    for name, hello in RECORDED:
        reader = ClientHelloReader()
        *before, last = [reader.feed(bytes((octet,))) for octet in hello]
        assert before == [None] * len(before)
        assert name_in(last) == name


def longest() -> bytes:
    """The longest message that there can be."""
    extensions = b"".join(b"\x33\x33" + vector(2, bytes(996)) for _ in range(65))
    extensions += b"\0\0" + vector(2, vector(2, b"\0" + vector(2, b"last.example")))
    extensions += b"\x33\x33" + vector(2, bytes(0xFFFF - len(extensions) - 4))
    body = b"\3\3" + bytes(32) + vector(1, bytes(32)) + vector(2, bytes(0xFFFE))
    body += vector(1, bytes(0xFF)) + vector(2, extensions)
    assert len(body) == MAX_MESSAGE_OCTETS
    return b"\1" + vector(3, body)


def in_records(message: bytes, count: int) -> bytes:
    """The message, cut into so many records of about the same length."""
    cuts = [len(message) * number // count for number in range(count + 1)]
    return b"".join(record(message[start:end]) for start, end in pairwise(cuts))


# A second, where each octet is looked at once; hours, where all are each time.
@pytest.mark.timeout(60)
def test_the_longest_in_the_smallest_pieces_is_read() -> None:
    reader = ClientHelloReader()
    octets = in_records(longest(), MAX_RECORDS)
    *before, last = [reader.feed(bytes((octet,))) for octet in octets]
    assert not any(before)
    assert name_in(last) == "last.example"


def lines_run(octets: bytes, feed: Callable[[int], object]) -> int:
    """How many lines of the parser's code run, if this is called for each octet's place."""
    count = 0

    def of_the_parser(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        count += event == "line"
        return of_the_parser if frame.f_code.co_filename == client_hello.__file__ else None

    before = sys.gettrace()
    sys.settrace(of_the_parser)
    try:
        for place in range(len(octets)):
            feed(place)
    finally:
        sys.settrace(before)
    return count


def test_the_work_grows_with_the_octets_and_not_with_their_square() -> None:
    """For octets that come one by one, in records of eight."""

    def growth(read_on: Callable[[ClientHelloReader, bytes, int], object]) -> float:
        """How much more work four times as many octets are."""
        work = []
        for records in (30, 120):
            reader = ClientHelloReader()
            octets = in_records(message(bytes(8 * records)), records)[:-1]
            work.append(lines_run(octets, partial(read_on, reader, octets)))
        return work[1] / work[0]

    assert growth(lambda reader, octets, at: reader.feed(octets[at : at + 1])) < 5
    # The control: where nothing is kept from one octet to the next.
    assert growth(lambda _, octets, at: ClientHelloReader().feed(octets[: at + 1])) > 10


@pytest.mark.parametrize("whole", [longest(), RECORDED[0][1][5:]], ids=["longest", "usual"])
def test_what_is_cut_into_more_records_is_refused_at_once(whole: bytes) -> None:
    octets = in_records(whole, MAX_RECORDS + 1)
    last = octets.rindex(record(b"")[:3])
    with pytest.raises(InvalidClientHello, match=f"more than {MAX_RECORDS} records") as refused:
        read(octets[: last + 5])
    assert refused.value.alert == Alert.UNEXPECTED_MESSAGE
    assert is_incomplete(octets[: last + 4])
    assert read(in_records(whole, MAX_RECORDS)) is not None


@given(recorded=st.sampled_from(RECORDED), data=st.data())
def test_records_may_split_a_client_hello_anywhere(
    recorded: tuple[str | None, bytes], data: st.DataObject
) -> None:
    name, hello = recorded
    octets = b"".join(map(record, cut(hello[5:], data)))
    assert name_in(read(octets)) == name
    assert is_incomplete(octets[: data.draw(st.integers(0, len(octets) - 1))])


@given(st.sampled_from(RECORDED), st.binary(max_size=200))
def test_what_follows_a_client_hello_does_not_matter(
    recorded: tuple[str | None, bytes], more: bytes
) -> None:
    name, hello = recorded
    assert name_in(read(hello + more)) == name


@given(st.sampled_from(RECORDED), st.data())
def test_a_damaged_client_hello_is_read_or_refused(
    recorded: tuple[str | None, bytes], data: st.DataObject
) -> None:
    octets = bytearray(recorded[1])
    for _ in range(data.draw(st.integers(1, 4))):
        octets[data.draw(st.integers(0, len(octets) - 1))] = data.draw(st.integers(0, 255))
    read_or_refuse(bytes(octets))


# --- anything --------------------------------------------------------------------------


def read_or_refuse(octets: bytes) -> None:
    """Nothing else happens."""
    try:
        hello = read(octets)
    except InvalidClientHello:
        return
    name = hello and hello.server_name
    assert name is None or (name.isascii() and name.isprintable() and name == name.lower())


@given(st.binary(max_size=2000))
@example(b"")
@example(b"\x16")
@example(b"\x16\3\1\0\4\1\0\0\0")
def test_any_octets_are_read_or_refused(octets: bytes) -> None:
    read_or_refuse(octets)


@given(st.binary(max_size=500))
def test_any_message_is_read_or_refused(body: bytes) -> None:
    read_or_refuse(record(message(None, body)))


@given(st.binary(max_size=500))
def test_any_extensions_are_read_or_refused(extensions: bytes) -> None:
    read_or_refuse(record(message(extensions)))


def verdict_on(octets: bytes) -> int | None:
    """The alert that these octets get; None if they get none, or not yet."""
    try:
        read(octets)
    except InvalidClientHello as error:
        return error.alert
    return None


@given(st.binary(min_size=1, max_size=300))
def test_what_is_refused_early_is_refused_with_more_too(octets: bytes) -> None:
    verdicts = [verdict_on(octets[:length]) for length in range(len(octets) + 1)]
    refusals = [verdict for verdict in verdicts if verdict is not None]
    if refusals:
        assert verdicts[-len(refusals) :] == [refusals[0]] * len(refusals)


@given(st.binary(min_size=1, max_size=300), st.data())
def test_what_is_refused_whole_is_refused_in_pieces_too(octets: bytes, data: st.DataObject) -> None:
    reader = ClientHelloReader()
    verdict = None
    try:
        for piece in cut(octets, data):
            reader.feed(piece)
    except InvalidClientHello as error:
        verdict = error.alert
    assert verdict == verdict_on(octets)


# --- names -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [(b"a", "a"), (b"WWW.Example.ORG", "www.example.org"), (b"x" * 255, "x" * 255)],
)
def test_a_name_is_given_in_lower_case(name: bytes, expected: str) -> None:
    assert name_in(read(with_name(name))) == expected


@pytest.mark.parametrize(
    ("octets", "reason"),
    [
        (with_name(b""), "a server_name of 0 octets"),
        (with_name(b"name", kind=1), "a server_name that is not a host name"),
        (record(message(b"\0\0\0\2\0")), "a field runs past its end"),
        (record(message(None, b"\3\3" + bytes(31))), "a field runs past its end"),
        (record(message(None, b"")), "a field runs past its end"),
        (record(b""), "a record of 0 octets"),
    ],
)
def test_what_contradicts_itself_gets_decode_error(octets: bytes, reason: str) -> None:
    error = refusal_of(octets)
    assert (str(error), error.alert, error.http) == (reason, Alert.DECODE_ERROR, False)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"x" * 256, "a server_name of 256 octets"),
        (b"caf\xc3\xa9.example", "a server_name that is not ASCII"),
        (b"a\0b", "a server_name with control characters"),
        (b"a\nb", "a server_name with control characters"),
    ],
)
def test_what_cannot_be_a_name_gets_illegal_parameter(name: bytes, reason: str) -> None:
    error = refusal_of(with_name(name))
    assert (str(error), error.alert, error.http) == (reason, Alert.ILLEGAL_PARAMETER, False)


def test_a_record_that_is_too_long_gets_record_overflow() -> None:
    """RFC 8446 §5.1: above 2^14 octets."""
    assert is_incomplete(b"\x16\3\1\x40\0")
    error = refusal_of(b"\x16\3\1\x40\1")
    assert (str(error), error.alert) == ("a record of 16385 octets", Alert.RECORD_OVERFLOW)


def test_a_client_hello_without_extensions_has_no_name() -> None:
    assert read_whole(record(message(None))).server_name is None
    assert read_whole(record(message(b""))).server_name is None


# --- what is none ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("octets", "reason"),
    [
        (b"\0", "not TLS"),
        (b"SSH-2.0-", "not TLS"),
        (b"GEX", "not TLS"),
        (b"\x16\2\0\0\1", "not a TLS record"),
        (record(b"\2"), "handshake message 2 instead of a ClientHello"),
        (record(b"\1\0") + b"\x17", "a record of type 23 within the ClientHello"),
        (record(b"\1\0") + b"G", "a record of type 71 within the ClientHello"),
    ],
)
def test_what_is_no_client_hello_gets_unexpected_message(octets: bytes, reason: str) -> None:
    error = refusal_of(octets)
    assert (str(error), error.alert, error.http) == (reason, Alert.UNEXPECTED_MESSAGE, False)


@pytest.mark.parametrize(
    "method",
    ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "PRI"],
)
def test_plain_http_is_known_as_soon_as_it_can_be(method: str) -> None:
    request = f"{method} / HTTP/1.1\r\n".encode()
    known = min(len(method) + 1, 5)
    assert all(is_incomplete(request[:length]) for length in range(known))
    assert refusal_of(request[:known]).http
    assert refusal_of(request).http


def test_a_client_hello_that_announces_too_much_is_refused_at_once() -> None:
    assert is_incomplete(record(b"\1" + MAX_MESSAGE_OCTETS.to_bytes(3, "big")))
    error = refusal_of(record(b"\1" + (MAX_MESSAGE_OCTETS + 1).to_bytes(3, "big")))
    assert error.alert == Alert.ILLEGAL_PARAMETER
    assert str(error) == "a ClientHello of 131397 octets (131396 are possible)"


def test_an_alert_is_one_record() -> None:
    alert = fatal_alert(Alert.UNRECOGNIZED_NAME)
    assert (alert[0], alert[1], alert[3:]) == (21, 3, b"\0\2\2\x70")


# --- the protocols that a client offers --------------------------------------------------


def with_protocols(data: bytes | None) -> ClientHello:
    """A ClientHello with this in its extension for them; None: it has no such extension."""
    extensions = b"\0\x2b" + vector(2, b"\2\3\4")
    if data is not None:
        extensions += b"\0\x10" + vector(2, data)
    return read_whole(record(message(extensions)))


def protocol_list(*names: bytes) -> bytes:
    return vector(2, b"".join(vector(1, name) for name in names))


def test_what_openssl_offers() -> None:
    assert offered_protocols(read_whole(recorded_by_the_system("a.example"))) == (
        b"h2",
        b"http/1.1",
    )
    assert offered_protocols(read_whole(recorded("a.example"))) is None


@given(st.lists(st.binary(min_size=1, max_size=255), min_size=1, max_size=20).map(tuple))
def test_what_is_offered_is_read(names: tuple[bytes, ...]) -> None:
    assert offered_protocols(with_protocols(protocol_list(*names))) == names


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\0\0",
        protocol_list(b"h2", b""),
        protocol_list(b""),
        protocol_list(b"h2") + b"\0",
        protocol_list(b"h2")[:-1],
        b"\0\3\3h2",
        b"\0\4\2h2",
    ],
)
def test_a_malformed_list_of_protocols_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidClientHello) as caught:
        offered_protocols(with_protocols(data))
    assert caught.value.alert == Alert.DECODE_ERROR


@given(st.binary(max_size=40))
def test_any_octets_are_a_list_of_protocols_or_refused(data: bytes) -> None:
    try:
        names = offered_protocols(with_protocols(data))
    except InvalidClientHello:
        return
    assert names is not None
    assert protocol_list(*names) == data
