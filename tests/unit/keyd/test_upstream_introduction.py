"""The PROXY header with a client's name: as our own parent writes it, and whatever else comes."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyd.protocol import Malformed
from keyd.upstream.introduction import client_name, missing_octets

HEAD_OCTETS = 16


def header(tlvs: bytes = b"", family: int = 0x11, command: int = 0x21) -> bytes:
    addresses = bytes({0x11: 12, 0x00: 0}.get(family, 36))
    body = addresses + tlvs
    start = b"\r\n\r\n\0\r\nQUIT\n" + bytes((command, family))
    return start + len(body).to_bytes(2, "big") + body


def tlv(kind: int, value: bytes) -> bytes:
    return bytes((kind,)) + len(value).to_bytes(2, "big") + value


@given(st.integers(0, 400))
def test_it_is_missing_what_has_not_come(cut: int) -> None:
    """And nothing of what comes after it is asked for."""
    whole = header(tlv(0x20, bytes(300)) + tlv(0xE0, b"proxy-a"))
    begun = whole[:cut]
    while (missing := missing_octets(begun)) > 0:
        begun += whole[len(begun) :][:missing]
    assert begun == whole
    assert client_name(begun) == "proxy-a"


@pytest.mark.parametrize("family", [0x11, 0x21, 0x00])
def test_names(family: int) -> None:
    assert client_name(header(tlv(0xE0, b"proxy-a"), family)) == "proxy-a"
    assert client_name(header(tlv(0x20, b"about TLS"), family)) == ""
    assert client_name(header(command=0x20)) is None


@pytest.mark.parametrize(
    "tlvs",
    [
        tlv(0xE0, b"a") + tlv(0xE0, b"b"),
        tlv(0xE0, b"a" * 65),
        tlv(0xE0, b"a\n"),
        tlv(0xE0, "ä".encode()),
        tlv(0xE0, b"abc")[:-1],
        b"\xe0\0",
        b"\xe0",
    ],
)
def test_what_our_parent_does_not_write(tlvs: bytes) -> None:
    with pytest.raises(Malformed):
        client_name(header(tlvs))


def test_other_families_and_commands() -> None:
    for family, command in ((0x31, 0x21), (0x11, 0x22), (0x12, 0x21)):
        with pytest.raises(Malformed):
            client_name(header(family=family, command=command))
    with pytest.raises(Malformed):
        client_name(header()[:14] + b"\0\5" + bytes(5))


@pytest.mark.parametrize(
    "begun", [b"PROXY TCP4", b"\r\n\r\n\0\r\nQUIT\r", header()[:14] + b"\xff\xff"]
)
def test_what_is_no_header_is_refused_at_once(begun: bytes) -> None:
    with pytest.raises(Malformed):
        missing_octets(begun)


@given(st.binary(max_size=200), st.sampled_from([0x11, 0x21]))
def test_whatever_fields_there_are(tlvs: bytes, family: int) -> None:
    with suppress(Malformed):
        name = client_name(header(tlvs, family))
        assert name is not None
        assert name.isascii()


@given(st.binary(max_size=80))
def test_whatever_comes(octets: bytes) -> None:
    with suppress(Malformed):
        if missing_octets(octets) == 0:
            client_name(octets)
