"""Asking for TLS before it begins: what is answered, and what is left in the socket."""

import socket
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from titus_py.between.postgresql import ASKING, SSL_REQUEST
from titus_py.parent.first_flight import NOTHING, FirstFlight, look
from titus_py.parent.starttls import look_before_tls

GSSENC_REQUEST = ASKING[1]


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


def said(pair: tuple[socket.socket, socket.socket], octets: bytes) -> tuple[FirstFlight, bool]:
    """What is made of these octets, by a client that sends them at once."""
    ours, theirs = pair
    theirs.send(octets)
    return look_before_tls(ours, ours.recv(4096, socket.MSG_PEEK))


def rest(side: socket.socket) -> bytes:
    try:
        return side.recv(4096)
    except BlockingIOError:
        return b""


@given(st.binary(min_size=1, max_size=64))
@example(SSL_REQUEST)
@example(GSSENC_REQUEST)
@example(SSL_REQUEST + b"\x16\3\1")
@example(SSL_REQUEST[:7])
@example(SSL_REQUEST[:7] + b"\0")
@example(b"\x16\3\1\0")
def test_one_octet_for_a_request_and_none_for_anything_else(
    pair: tuple[socket.socket, socket.socket], octets: bytes
) -> None:
    ours, theirs = pair
    flight, may_ask = said(pair, octets)
    left, answer = rest(ours), rest(theirs)
    if octets.startswith(SSL_REQUEST):
        assert (left, answer, may_ask) == (octets[8:], b"S", False)
        assert flight == look(octets[8:])
    elif octets.startswith(GSSENC_REQUEST):
        assert (left, answer, may_ask) == (octets[8:], b"N", True)
    else:
        assert (left, answer) == (octets, b"")
        assert may_ask == any(one.startswith(octets) for one in ASKING)
        assert flight == (FirstFlight(8) if may_ask else look(octets))


def test_what_is_neither_is_for_a_worker_to_refuse(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    assert said(pair, b"\0\0\0\x10\x04\xd2\x16\x2e" + bytes(8)) == (NOTHING, False)
    rest(pair[0])
