"""What the parent, its fork server and a worker say to each other."""

import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titus_py.between.messages import (
    FORK_SERVER_OCTETS,
    FORKED_OCTETS,
    MAX_CLIENT_OCTETS,
    MAX_PROTOCOLS,
    MAX_VHOSTS,
    WORKER_MESSAGE_OCTETS,
    Client,
    Dial,
    Ends,
    Forked,
    Leaving,
    Malformed,
    Prepared,
    Proxied,
    Ready,
    TlsFacts,
    decode_from_fork_server,
    decode_from_worker,
)

#: As ``orders.c`` has it.
FORKED = struct.Struct("=cqI")


def texts(most: int) -> st.SearchStrategy[str]:
    return st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=most)


@given(
    st.integers(0, 65535),
    st.none() | st.integers(0, MAX_PROTOCOLS - 1),
    st.none() | st.builds(TlsFacts, texts(16), texts(64), texts(255)),
)
def test_a_dial_comes_back(vhost: int, protocol: int | None, facts: TlsFacts | None) -> None:
    dial = Dial(vhost, protocol, facts)
    assert decode_from_worker(dial.encode()) == dial


ADDRESSES = st.ip_addresses().map(str)
PORTS = st.integers(0, 65535)


@given(st.none() | st.builds(Ends, ADDRESSES, PORTS, ADDRESSES, PORTS))
def test_a_balancers_word_comes_back(ends: Ends | None) -> None:
    proxied = Proxied(ends)
    message = decode_from_worker(proxied.encode())
    assert isinstance(message, Proxied)
    assert message.encode() == proxied.encode()
    if ends is not None:
        assert message.ends is not None
        for sent, came in ((ends.client, message.ends.client), (ends.server, message.ends.server)):
            address = ip_address(sent)
            assert ip_address(came) == (getattr(address, "ipv4_mapped", None) or address)


def test_a_ready_comes_back() -> None:
    assert decode_from_worker(Ready().encode()) == Ready()


@given(
    st.lists(st.integers(0, 65535), max_size=50).map(tuple),
    st.integers(0, 2**32 - 1),
)
def test_a_client_comes_back(vhosts: tuple[int, ...], timeout: int) -> None:
    client = Client(vhosts, timeout)
    assert Client.decode(client.encode()) == client


def test_the_largest_messages_fit() -> None:
    assert len(Client(tuple(range(MAX_VHOSTS))).encode()) == MAX_CLIENT_OCTETS
    facts = TlsFacts("v" * 16, "s" * 64, "n" * 255)
    assert len(Dial(65535, None, facts).encode()) == WORKER_MESSAGE_OCTETS - 1
    assert len(Ready().encode()) < WORKER_MESSAGE_OCTETS


@given(st.binary(max_size=WORKER_MESSAGE_OCTETS))
def test_any_octets_from_a_worker_are_a_message_or_malformed(octets: bytes) -> None:
    try:
        message = decode_from_worker(octets)
    except Malformed:
        return
    assert message.encode() == octets


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        b"r",
        b"RR",
        b"R\0",
        b"D",
        b"D\0\0",
        b"D\0\0\0\0",
        # TLS facts: one too few or too many, too long, cut off, not printable, not ASCII.
        b"D\0\0\0" + b"\1v\1s",
        b"D\0\0\0" + b"\1v\1s\1n\0",
        b"D\0\0\0" + b"\x11" + b"v" * 17 + b"\1s\1n",
        b"D\0\0\0" + b"\1v\1s\2n",
        b"D\0\0\0" + b"\1v\1s\1\n",
        b"D\0\0\0" + b"\1v\1s\1\xe9",
        # A balancer's word: too short, too long, neither known nor unknown, an unknown address.
        b"P" + bytes(36),
        b"P" + bytes(38),
        b"P\2" + bytes(36),
        b"P\0" + bytes(35) + b"\1",
        b"C" + bytes(8),
        b"B",
        b"F",
    ],
)
def test_a_worker_has_three_things_to_say(octets: bytes) -> None:
    with pytest.raises(Malformed):
        decode_from_worker(octets)


ANSWERS = st.builds(
    FORKED.pack,
    st.sampled_from([b"P", b"E", b"X"]),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 4096) | st.integers(0, 2**32 - 1),
)


@given(st.binary(max_size=FORKED_OCTETS + 1) | ANSWERS)
def test_any_octets_from_the_fork_server_are_an_answer_or_malformed(octets: bytes) -> None:
    try:
        forked = Forked.decode(octets)
    except Malformed:
        return
    kind = b"E" if forked.error else b"P"
    assert octets == FORKED.pack(kind, forked.uid, forked.error or forked.pid)


@given(st.binary(max_size=FORK_SERVER_OCTETS).map(lambda why: b"L" + why))
def test_any_reason_of_the_fork_servers_is_a_line_or_malformed(octets: bytes) -> None:
    try:
        said = decode_from_fork_server(octets)
    except Malformed:
        return
    assert isinstance(said, Leaving)
    assert said.encode() == octets
    assert len(octets) < FORK_SERVER_OCTETS
    assert said.why.isprintable()


def test_a_reason_that_is_too_long_is_cut_off() -> None:
    said = decode_from_fork_server(Leaving("h\u00e4ngt " * 100).encode())
    assert isinstance(said, Leaving)
    assert said.why == ("h?ngt " * 100)[:200]
    assert isinstance(decode_from_fork_server(FORKED.pack(b"P", 1, 1)), Forked)


def test_a_reason_with_control_characters_arrives_without_them() -> None:
    assert decode_from_fork_server(Leaving("no\nway\t\x1b").encode()) == Leaving("no?way??")


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_what_a_fork_server_has_prepared_comes_back(pages: int, of_code: int) -> None:
    prepared = Prepared(pages, of_code)
    assert decode_from_fork_server(prepared.encode()) == prepared


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        # A worker's: "ready" alone, and one with too much.
        b"R",
        b"R" + bytes(5),
        b"P" + bytes(7),
        # No such process, no such error, neither of the two.
        b"P" + bytes(8),
        b"P" + bytes(4) + b"\xff" * 4,
        b"E" + bytes(8),
        b"E" + bytes(4) + b"\0\0\x10\0",
        b"R" + bytes(4),
        b"R" + bytes(9),
    ],
)
def test_nothing_else_is_an_answer_of_a_fork_server(octets: bytes) -> None:
    with pytest.raises(Malformed):
        decode_from_fork_server(octets)
