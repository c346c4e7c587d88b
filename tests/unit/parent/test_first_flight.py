"""How much of a client's first octets is its ClientHello, however they are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from integration.hellos import client_hello, records

from keyd.protocol import MAX_CLIENT_HELLO_OCTETS
from titus_py.parent.first_flight import MAX_RECORDS, NOTHING, FirstFlight, look
from titus_py.worker import client_hello as workers
from titus_py.worker.client_hello import ClientHelloReader, InvalidClientHello
from titus_py.worker.proxy_header import InvalidProxyHeader, ProxyHeaderReader

HELLO = client_hello()
LINE = b"PROXY TCP4 192.0.2.1 203.0.113.2 56324 443\r\n"
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
BINARY = SIGNATURE + b"\x21\x11\0\x13\xc0\0\2\1\xcb\0\x71\2\xdc\4\1\xbb\xe0\0\4abcd"
HEADERS = [LINE, BINARY, b"PROXY UNKNOWN\r\n", SIGNATURE + b"\x20\0\0\0"]


def looked(octets: bytes, header: bool = False) -> tuple[FirstFlight, list[int]]:
    """What comes of octets that come in as small pieces as are asked for."""
    asked, there = [], 1
    while (flight := look(octets[:there], header)).needs:
        assert flight.needs > there, "another look would see no more"
        asked.append(there := flight.needs)
        if there > len(octets):
            break
    return flight, asked


@given(st.integers(1, 300), st.binary(max_size=20))
def test_a_client_hello_is_seen_in_records_of_any_size(size: int, behind: bytes) -> None:
    flight, asked = looked(records(HELLO, size) + behind)
    assert flight == FirstFlight(0, HELLO)
    # Nothing is waited for that may never come.
    assert asked[-1] <= len(records(HELLO, size))


@pytest.mark.parametrize("header", HEADERS)
def test_behind_a_header(header: bytes) -> None:
    octets = header + records(HELLO)
    flight, _ = looked(octets, header=True)
    assert flight == FirstFlight(0, HELLO, after_header=True)
    for there in range(len(octets)):
        assert look(octets[:there], header=True).after_header == (there >= len(header))


@given(st.binary(max_size=40), st.integers(0, 30), st.booleans())
def test_whatever_else_comes(octets: bytes, kept: int, header: bool) -> None:
    """It is waited for, or nothing is: and always for more than there is."""
    beginnings = (b"", records(HELLO)[:kept], LINE[:kept], BINARY[:kept])
    for beginning in beginnings:
        flight = look(beginning + octets, header)
        assert flight.needs == 0 or flight.needs > len(beginning + octets)


@given(st.binary(max_size=12), st.integers(0, 60), st.integers(1, 80))
def test_what_is_seen_is_what_a_worker_reads(octets: bytes, at: int, size: int) -> None:
    """Damaged or not: where the worker finds a message, it is this one."""
    sent = bytearray(records(HELLO, size))
    sent[at : at + len(octets)] = octets
    seen = look(bytes(sent))
    try:
        read = ClientHelloReader().feed(bytes(sent))
    except InvalidClientHello:
        return
    if read is None:
        assert seen.needs
    else:
        assert seen.client_hello[4:] == read.octets


@given(st.binary(max_size=30), st.sampled_from(HEADERS), st.integers(0, 60))
def test_a_header_ends_where_a_worker_lets_it_end(octets: bytes, header: bytes, at: int) -> None:
    sent = bytearray(header + records(HELLO))
    sent[at : at + len(octets)] = octets
    reader = ProxyHeaderReader()
    try:
        taken = reader.feed(bytes(sent))
    except InvalidProxyHeader:
        return
    flight = look(bytes(sent), header=True)
    assert flight.after_header == reader.done
    rest = look(bytes(sent[taken:])) if reader.done else FirstFlight(1)
    assert flight.client_hello == rest.client_hello


@pytest.mark.parametrize(
    "octets",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"G",
        b"\x16\2",
        b"\x16\3\1\0\0",
        b"\x16\3\1\x40\1",
        b"\x16\3\1\0\4\2\0\0\0",
        b"\x16\3\1\0\4\1" + (MAX_CLIENT_HELLO_OCTETS - 3).to_bytes(3, "big"),
        b"\x16\3\1\0\1\1" * (MAX_RECORDS + 1),
        b"\x16\3\1\0\1\1\x17",
    ],
)
def test_what_cannot_become_one_is_not_waited_for(octets: bytes) -> None:
    assert look(octets) == NOTHING


@pytest.mark.parametrize(
    "octets", [records(HELLO), b"PROXX", b"PROXY " + bytes(101), b"\r\n\r\n\r", b"GET"]
)
def test_what_is_no_header_is_not_waited_for(octets: bytes) -> None:
    assert look(octets, header=True) == NOTHING


def test_the_longest_there_is() -> None:
    message = b"\1" + (MAX_CLIENT_HELLO_OCTETS - 4).to_bytes(3, "big")
    message += bytes(MAX_CLIENT_HELLO_OCTETS - 4)
    flight, _ = looked(BINARY + records(message), header=True)
    assert flight.client_hello == message
    # What a worker reads is seen.
    assert MAX_CLIENT_HELLO_OCTETS == 4 + workers.MAX_MESSAGE_OCTETS
    assert MAX_RECORDS == workers.MAX_RECORDS
