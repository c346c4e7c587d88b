"""The hash that keyd signs in TLS 1.3: of a server's messages, in their order, and of no others."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from integration.hellos import (
    RETRY,
    TLS12,
    certificate_verify,
    client_hello,
    flight,
    message,
    server_hello,
)

from keyd.client_hello import InvalidClientHello
from keyd.transcript import InvalidFlight, SecondHelloDiffers, Witnessed

HELLO = client_hello()
REQUEST = message(13, b"\0\0\0")


@pytest.mark.parametrize(
    ("suite", "name"),
    [(0x1301, "sha256"), (0x1302, "sha384"), (0x1303, "sha256"), (0x1304, "sha256")],
)
@pytest.mark.parametrize("request_", [b"", REQUEST], ids=["", "certificate request"])
def test_the_hash_is_of_all_messages(suite: int, name: str, request_: bytes) -> None:
    messages = server_hello(suite) + message(8, b"\0\0") + request_ + message(11, b"chain")
    expected = hashlib.new(name, HELLO + messages).digest()
    witnessed = Witnessed(HELLO)
    assert witnessed.transcript_hash(messages) == expected
    assert witnessed.transcript_hash(messages) == expected, "nothing is left of the first time"
    verify = certificate_verify(HELLO, messages, name)
    assert verify.endswith(expected)


@pytest.mark.parametrize(("suite", "name"), [(0x1301, "sha256"), (0x1302, "sha384")])
def test_after_a_hello_retry_request(suite: int, name: str) -> None:
    """RFC 8446 §4.4.1: the first ClientHello counts as its hash."""
    second = client_hello(more=[(51, b"another share")])
    messages = flight(suite, server_hello(suite, RETRY), second)
    first = hashlib.new(name, HELLO).digest()
    synthetic = bytes((254, 0, 0, len(first))) + first
    assert Witnessed(HELLO).transcript_hash(messages) == (
        hashlib.new(name, synthetic + messages).digest()
    )


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (b"", "without any"),
        (flight()[:-1], "cut short"),
        (flight() + b"\x14", "cut short"),
        (flight() + message(20, bytes(32)), "messages 2, 8, 11, 20"),
        (flight() + message(15, b"signed"), "messages 2, 8, 11, 15"),
        (server_hello() + message(11, b""), "messages 2, 11"),
        (message(8, b"") + flight(), "messages 8, 2, 8, 11"),
        (HELLO + flight(), "messages 1, 2, 8, 11"),
        (message(254, bytes(32)) + flight(), "messages 254, 2, 8, 11"),
        (server_hello() + message(8, b"") + REQUEST * 2 + message(11, b""), "2, 8, 13, 13, 11"),
        (flight() + flight(), "messages 2, 8, 11, 2, 8, 11"),
        (flight() * 100, "messages 2, 8, 11, 2, 8, 11, 2"),
        (flight(0xC02B), "cipher suite 0xc02b"),
        (message(2, b"") + message(8, b"") + message(11, b""), "cipher suite 0x"),
        (server_hello(random=RETRY) + flight()[len(server_hello()) :], "out of place"),
        (flight(0x1301, server_hello(), HELLO), "none in its place"),
        (flight(0x1302, server_hello(0x1301, RETRY), HELLO), "another hash"),
        (flight(0x1301, server_hello(0x1301, RETRY), HELLO) + HELLO, "messages 2, 1, 2, 8, 11, 1"),
        (
            server_hello(random=RETRY) + HELLO + server_hello(random=RETRY) + flight()[-20:],
            "cut short|messages",
        ),
    ],
)
def test_what_no_server_sends_is_refused(messages: bytes, reason: str) -> None:
    with pytest.raises(InvalidFlight, match=reason):
        Witnessed(HELLO).transcript_hash(messages)


@pytest.mark.parametrize(
    "second",
    [
        client_hello("another.test"),
        client_hello(None),
        client_hello(random=bytes(32)),
        client_hello(versions=[TLS12]),
        client_hello()[:-1],
        client_hello(more=[(1000 + number, b"") for number in range(300)]),
    ],
    ids=["name", "no name", "random", "versions", "malformed", "extensions"],
)
def test_a_second_hello_that_is_another_clients(second: bytes) -> None:
    """This a client can bring about: the first was for another virtual host's key."""
    messages = flight(0x1301, server_hello(random=RETRY), message(1, second[4:]))
    with pytest.raises(SecondHelloDiffers):
        Witnessed(HELLO).transcript_hash(messages)


@given(st.binary(max_size=300), st.integers(0, 200))
def test_any_octets_lead_to_a_hash_or_are_refused(octets: bytes, at: int) -> None:
    retried = flight(0x1301, server_hello(random=RETRY), HELLO)
    for messages in (octets, flight()[:at] + octets, retried[:at] + octets):
        try:
            assert len(Witnessed(HELLO).transcript_hash(messages)) in (32, 48)
        except (InvalidFlight, SecondHelloDiffers):
            continue


def test_what_is_no_client_hello_is_not_witnessed() -> None:
    with pytest.raises(InvalidClientHello):
        Witnessed(server_hello())
