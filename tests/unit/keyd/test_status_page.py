"""keyd's page about itself: what is written is read; and nothing else is taken for a report."""

import gc
import json
import os
import socket
import struct
import zlib
from collections import UserDict
from collections.abc import Iterator, KeysView
from contextlib import contextmanager

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from keyd.inspection.reports import Unreadable, read
from keyd.powers import Key
from keyd.protocol import Operation, Refusal, Status
from keyd.reference import key_id
from keyd.status_page import NAME, OCTETS, VERSION, Report, StatusPage
from keyd.tally import Tally
from keyd.token.keys import States, Token
from keyd.token.messages import Down, Ready


def own_page() -> int:
    """A descriptor of this process's page, once those of earlier tests are gone."""
    gc.collect()
    numbers = sorted(map(int, os.listdir("/proc/self/fd")), reverse=True)
    for number in numbers:
        try:
            if os.readlink(f"/proc/self/fd/{number}").startswith(f"/memfd:{NAME} "):
                return number
        except FileNotFoundError:
            continue
    raise AssertionError("no page")


def test_what_is_written_is_read() -> None:
    keys = {key_id(one.public_key()): one for one in (ec.generate_private_key(ec.SECP256R1()),)}
    tally = Tally()
    page = StatusPage("listen")
    page.tell_of(
        keys, lambda: dict.fromkeys(keys, "/etc/www.key"), ["/run/www.sock"], tally, States(())
    )
    assert read(own_page()).signed == 0
    tally.done(Operation.SIGN, 0.001)
    tally.refused(Status.NOT_TLS)
    page.refused(Refusal(0, Status.NOT_TLS, "x" * 1000), 77)
    page.write()
    report = read(own_page())
    ((name, kind, identity),) = report.keys
    assert (name, kind, identity) == ("/etc/www.key", "secp256r1", next(iter(keys)).hex())
    assert (report.signed, report.refused) == (1, {"not_tls": 1})
    (last,) = report.last_refused
    assert (last.status, last.detail, last.process) == ("not_tls", "x" * 200, 77)


@pytest.mark.parametrize(("character", "told"), [("x", 128), ("\u202e", 128), ("\U0001f511", 32)])
def test_any_number_of_keys_and_refusals_fits(character: str, told: int) -> None:
    """Whatever JSON makes of a character: up to twelve octets."""
    key = ec.generate_private_key(ec.SECP256R1())
    keys = {number.to_bytes(32, "big"): key for number in range(20_000)}
    page = StatusPage("control")
    for _ in range(100):
        page.refused(Refusal(0, Status.NOT_GRANTED, character * 1000), 1)
    page.tell_of(
        keys,
        lambda: dict.fromkeys(keys, character * 1000),
        [character * 108] * 50,
        Tally(),
        tokens(character * 300, 64),
    )
    report = read(own_page())
    assert report.keys_in_all == 20_000
    assert len(report.keys) == told
    assert report.tokens


def tokens(name: str, count: int) -> States:
    """Tokens that have ended: what one of them says is an attacker's."""
    made = []
    for _ in range(count):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made.append(Token(name, ours, [], [], lambda _: None, lambda _: None))
        with ours, theirs:
            theirs.send(Down(True, name[:60]).encode())
            assert not made[-1].hear()
    return States(made)


def test_a_token_is_told_of_when_it_has_changed() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    token = Token("web", ours, [], [], lambda _: None, lambda _: None)
    page = StatusPage("listen")
    page.tell_of({}, dict, [], Tally(), States([token]))
    assert read(own_page()).tokens == [["web", "is starting", [0, 0, 0]]]
    with ours, theirs:
        theirs.send(Ready(()).encode())
        token.hear()
    page.write()
    assert read(own_page()).tokens == [["web", "ready", [0, 0, 1]]]


def test_keys_come_and_go() -> None:
    one, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    keys = {key_id(one.public_key()): one}
    page = StatusPage("listen")
    page.tell_of(keys, dict, [], Tally(), States(()))
    del keys[key_id(one.public_key())]
    keys[key_id(other.public_key())] = other
    page.keys_changed()
    page.write()
    ((_, _, identity),) = read(own_page()).keys
    assert identity == key_id(other.public_key()).hex()


def test_a_key_that_comes_while_the_page_is_written_is_told_of_the_next_time() -> None:
    one, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    page = StatusPage("listen")

    class Growing(UserDict[bytes, Key]):
        """Another thread takes a key in once these have been looked at."""

        def keys(self) -> KeysView[bytes]:
            seen = dict(self.data)
            if len(seen) == 1:
                self.data[key_id(other.public_key())] = other
                page.keys_changed()
            return seen.keys()

    page.tell_of(Growing({key_id(one.public_key()): one}), dict, [], Tally(), States(()))
    assert len(read(own_page()).keys) == 1
    page.write()
    assert len(read(own_page()).keys) == 2


@contextmanager
def holding(octets: bytes) -> Iterator[int]:
    descriptor = os.memfd_create("page")
    try:
        os.write(descriptor, octets)
        yield descriptor
    finally:
        os.close(descriptor)


def framed(text: bytes) -> bytes:
    return struct.pack("!II", zlib.crc32(text), len(text)) + text


# A page without a text is read again and again for a while.
@settings(deadline=None)
@given(st.binary(max_size=200))
def test_octets_are_no_report(octets: bytes) -> None:
    with holding(framed(octets)) as descriptor, pytest.raises(Unreadable):
        read(descriptor)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(st.sampled_from(Report._fields), _VALUES)
def test_a_report_is_in_order_or_none(field: str, value: object) -> None:
    fields = {
        "version": VERSION, "command": "listen", "started": 1.0, "sockets": ["/s"],
        "keys": [["n", "k", "00"]], "keys_in_all": 1, "signed": 1, "decrypted": 0,
        "refused": {}, "last_refused": [], "seconds": [1], "seconds_sum": 0.1,
        "tokens": [["t", "ready", [1, 0, 1]]], field: value,
    }  # fmt: skip
    with holding(framed(json.dumps(fields).encode())) as descriptor:
        try:
            report = read(descriptor)
        except Unreadable:
            return
    assert all(isinstance(one, str) for one in (report.command, *report.sockets))
    assert all(isinstance(word, str) for key in report.keys for word in key)
    assert all(type(count) is int for count in (report.signed, *report.refused.values()))


def test_a_page_that_is_too_long_is_not_read_to_its_end() -> None:
    with holding(framed(b" " * OCTETS + b"{}")) as descriptor, pytest.raises(Unreadable):
        read(descriptor)
