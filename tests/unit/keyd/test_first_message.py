"""keyd's reading of a client's first message: as the worker's, and never anything but a refusal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from integration.hellos import TLS12, TLS13, client_hello, records, vector

from keyd.client_hello import ClientHello, InvalidClientHello, TooManyExtensions, read
from titus_py.worker.client_hello import ClientHelloReader
from titus_py.worker.client_hello import InvalidClientHello as InvalidForWorker

VERSIONS = st.lists(st.sampled_from([TLS13, TLS12, b"\x7f\x1c", b"\x0a\x0a"]), max_size=4)
NAMES = st.one_of(st.none(), st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1,
                                     max_size=255))  # fmt: skip
MORE = st.lists(st.tuples(st.integers(100, 0xFFFF), st.binary(max_size=20)), max_size=5)


@given(NAMES, VERSIONS, st.binary(min_size=32, max_size=32), MORE)
def test_what_a_client_sent_is_read(
    name: str | None, versions: list[bytes], random: bytes, more: list[tuple[int, bytes]]
) -> None:
    message = client_hello(name, versions, random, more)
    assert read(message) == ClientHello(random, name, TLS13 in versions)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ([(0, vector(2, b"\1" + vector(2, b"a")))], "not a host name"),
        ([(0, vector(2, b""))], "not a host name"),
        ([(0, vector(2, b"\0" + vector(2, b"")))], "no name"),
        ([(0, vector(2, b"\0" + vector(2, b"a" * 256)))], "no name"),
        ([(0, vector(2, b"\0" + vector(2, b"\xc3\xa4")))], "no name"),
        ([(0, vector(2, b"\0" + vector(2, b"a\nb")))], "no name"),
        ([(0, b"\0\5\0\0\5ab")], "runs past its end"),
        ([(43, b"\3\3\4\3")], "malformed list of versions"),
        ([(43, b"\2\3\4\0")], "malformed list of versions"),
        ([(43, b"")], "runs past its end"),
    ],
)
def test_what_is_malformed_is_refused(more: list[tuple[int, bytes]], reason: str) -> None:
    with pytest.raises(InvalidClientHello, match=reason):
        read(client_hello(more=more))


def test_so_many_extensions_and_no_more() -> None:
    """Each takes time: of a quarter of a million octets there could be 16,000."""
    most = [(1000 + number, b"") for number in range(254)]
    assert read(client_hello("a", more=most)).server_name == "a"
    with pytest.raises(TooManyExtensions):
        read(client_hello("a", more=[*most, (2000, b"")]))


@given(st.binary(max_size=200))
def test_any_octets_are_a_message_or_refused(octets: bytes) -> None:
    for message in (octets, b"\1" + vector(3, octets), client_hello()[:-40] + octets):
        try:
            read(message)
        except InvalidClientHello:
            continue


@given(NAMES, VERSIONS, MORE, st.data())
def test_what_a_worker_takes_keyd_takes(
    name: str | None, versions: list[bytes], more: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    """Else any client could ring an alarm. Only lists of versions are OpenSSL's to judge."""
    message = bytearray(client_hello(name, versions, more=more))
    message[data.draw(st.integers(4, len(message) - 1))] = data.draw(st.integers(0, 255))
    try:
        taken = ClientHelloReader().feed(records(bytes(message)))
    except InvalidForWorker:
        return
    assert taken is not None
    try:
        hello = read(bytes(message))
    except InvalidClientHello:
        assert b"\0\x2b" in message
        return
    assert (hello.server_name or "").lower() == (taken.server_name or "")
