"""A load balancer's header: what is read of it, and where it ends."""

import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from proxyprotocol.result import ProxyResult, ProxyResultIPv4, ProxyResultIPv6
from proxyprotocol.tlv import ProxyProtocolTLV
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from titus_py.between.messages import Ends, Malformed, Proxied, decode_from_worker
from titus_py.worker.proxy_header import InvalidProxyHeader, ProxyHeaderReader, _crc32c

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
ENDS = Ends("192.0.2.1", 56324, "192.0.2.2", 443)
ENDS6 = Ends("2001:db8::1", 56324, "2001:db8::2", 443)
#: Headers, and what they say.
GOOD = [
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\r\n", ENDS),
    (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n",
     Ends("255.255.255.255", 65535, "255.255.255.255", 65535)),
    (b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n", Ends("0.0.0.0", 0, "0.0.0.0", 0)),
    (b"PROXY TCP6 2001:db8::1 2001:db8::2 56324 443\r\n", ENDS6),
    (b"PROXY TCP6 2001:0DB8:0::0:1 2001:db8:0:0:0:0:0:2 56324 443\r\n", ENDS6),
    (b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:192.0.2.2 56324 443\r\n",
     Ends("::ffff:192.0.2.1", 56324, "::ffff:192.0.2.2", 443)),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN ffff:f...f:ffff what ever it says 65535\r\n", None),
    (b"PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
     b" ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n", None),
    # PROXY over TCP, without and with TLVs: NOOP, an unknown one, and an empty one.
    (SIGNATURE + b"\x21\x11\0\x0c\xc0\0\2\1\xc0\0\2\2\xdc\4\1\xbb", ENDS),
    (SIGNATURE + b"\x21\x11\0\x1a\xc0\0\2\1\xc0\0\2\2\xdc\4\1\xbb"
     b"\4\0\2\0\0" b"\xe2\0\3abc" b"\xf0\0\0", ENDS),
    (SIGNATURE + b"\x21\x21\0\x24\x20\1\r\xb8" + bytes(11) + b"\1\x20\1\r\xb8" + bytes(11)
     + b"\2\xdc\4\1\xbb", ENDS6),
    # LOCAL, whatever follows; families without an address of a TCP client.
    (SIGNATURE + b"\x20\0\0\0", None),
    (SIGNATURE + b"\x20\xff\0\3abc", None),
    (SIGNATURE + b"\x20\x11\0\x0c\xc0\0\2\1\xc0\0\2\2\xdc\4\1\xbb", None),
    (SIGNATURE + b"\x21\0\0\0", None),
    (SIGNATURE + b"\x21\x31\0\xd8/run/client" + bytes(205), None),
    (SIGNATURE + b"\x21\x12\0\x0c\xc0\0\2\1\xc0\0\2\2\xdc\4\1\xbb", None),
    # The longest.
    (SIGNATURE + b"\x21\x11\xff\xff\xc0\0\2\1\xc0\0\2\2\xdc\4\1\xbb\xe0\xff\xf0" + bytes(65520),
     ENDS),
]  # fmt: skip
#: What is no header, and why.
BAD = [
    (b"GET / HTTP/1.1\r\n\r\n", "no PROXY header"),
    (b"proxy TCP4 192.0.2.1 192.0.2.2 56324 443\r\n", "no PROXY header"),
    (b"PROXY\tTCP4 192.0.2.1 192.0.2.2 56324 443\r\n", "no PROXY header"),
    (b"\x16\x03\x01\x02\x00\x01\x00", "TLS without a PROXY header"),
    (b"\0", "no PROXY header"),
    (SIGNATURE[:-1] + b"X\x21\x11\0\0", "no PROXY header"),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\n", "CR LF"),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2\n56324 443\r\n", "CR LF"),
    (b"PROXY UNKNOWN\n", "CR LF"),
    (b"PROXY UNKNOWN " + b"x" * 93, "more than 107"),
    (b"PROXY \r\n", "not in the form of version 1"),
    (b"PROXY UNKNOWNX\r\n", "not in the form of version 1"),
    (b"PROXY TCP5 192.0.2.1 192.0.2.2 56324 443\r\n", "not in the form of version 1"),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 56324\r\n", "not in the form of version 1"),
    (b"PROXY TCP4  192.0.2.1 192.0.2.2 56324 443\r\n", "not in the form of version 1"),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 443 \r\n", "not in the form of version 1"),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 443 1\r\n", "not in the form of version 1"),
    (b"PROXY TCP4 192.0.2.1 192.0.2 56324 443\r\n", "malformed address"),
    (b"PROXY TCP4 192.0.2.01 192.0.2.2 56324 443\r\n", "malformed address"),
    (b"PROXY TCP4 192.0.2.256 192.0.2.2 56324 443\r\n", "malformed address"),
    (b"PROXY TCP4 www.example.org 192.0.2.2 56324 443\r\n", "malformed address"),
    (b"PROXY TCP4 2001:db8::1 2001:db8::2 56324 443\r\n", "malformed address"),
    (b"PROXY TCP6 192.0.2.1 192.0.2.2 56324 443\r\n", "malformed address"),
    (b"PROXY TCP6 fe80::1%eth0 fe80::2 56324 443\r\n", "malformed address"),
    (b"PROXY TCP4 192.0.2.\xb2 192.0.2.2 56324 443\r\n", "malformed address"),
    (b"PROXY TCP4 192.0.2.1\0 192.0.2.2 56324 443\r\n", "malformed address"),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 65536 443\r\n", "malformed port"),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 056324 443\r\n", "malformed port"),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 -1 443\r\n", "malformed port"),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 +1 443\r\n", "malformed port"),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 00 443\r\n", "malformed port"),
    (SIGNATURE + b"\x11\x11\0\x0c", "version 1 of"),
    (SIGNATURE + b"\x31\x11\0\x0c", "version 3 of"),
    (SIGNATURE + b"\x22\x11\0\x0c", "command 2"),
    (SIGNATURE + b"\x21\x13\0\x0c", "family and protocol 0x13"),
    (SIGNATURE + b"\x21\x41\0\x0c", "family and protocol 0x41"),
    (SIGNATURE + b"\x21\x11\0\x0b" + bytes(11), "too short"),
    (SIGNATURE + b"\x21\x11\0\0", "too short"),
    (SIGNATURE + b"\x21\x21\0\x0c" + bytes(12), "too short"),
    (SIGNATURE + b"\x21\x11\0\x0d" + bytes(13), "cut off"),
    (SIGNATURE + b"\x21\x11\0\x10" + bytes(12) + b"\xe0\0\2a", "cut off"),
    (SIGNATURE + b"\x21\x11\0\x13" + bytes(12) + b"\3\0\4\1\2\3\4", "checksum"),
    (SIGNATURE + b"\x21\x11\0\x12" + bytes(12) + b"\3\0\3\1\2\3", "checksum"),
]


def read(pieces: Sequence[bytes]) -> tuple[ProxyHeaderReader, int]:
    """Feed pieces, as a socket would have them, to the end; how many octets were taken."""
    reader, taken = ProxyHeaderReader(), 0
    for piece in pieces:
        of_it = reader.feed(piece)
        taken += of_it
        if of_it < len(piece):
            break
    return reader, taken


def in_pieces(octets: bytes, size: int) -> list[bytes]:
    return [octets[start : start + size] for start in range(0, len(octets), size)]


@pytest.mark.parametrize(("octets", "ends"), GOOD)
@pytest.mark.parametrize("size", [70_000, 536, 7, 1])
@pytest.mark.parametrize("after", [b"", b"\x16\x03\x01\r\n", b"\n" * 200])
def test_a_header_is_read_to_its_last_octet_and_no_further(
    octets: bytes, ends: Ends | None, size: int, after: bytes
) -> None:
    reader, taken = read(in_pieces(octets + after, size))
    assert reader.done
    assert reader.ends == ends
    assert taken == len(octets)


@pytest.mark.parametrize(("octets", "why"), BAD)
@pytest.mark.parametrize("size", [1, 70_000])
def test_what_is_no_header(octets: bytes, why: str, size: int) -> None:
    with pytest.raises(InvalidProxyHeader, match=why):
        read(in_pieces(octets, size))


@pytest.mark.parametrize(("octets", "ends"), GOOD[:-1])
def test_a_part_of_a_header_is_not_one_yet(octets: bytes, ends: Ends | None) -> None:
    for end in range(len(octets)):
        reader, taken = read([octets[:end]])
        assert not reader.done
        assert taken == end


CORPUS = [octets for octets, _ in [*GOOD[:-1], *BAD]]


@st.composite
def nearly(draw: st.DrawFn) -> bytes:
    """A header of the corpus, changed, cut or run on."""
    octets = bytearray(draw(st.sampled_from(CORPUS)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(octets)))
        octets[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(octets)


@given(st.binary(max_size=600) | nearly(), st.lists(st.integers(1, 80), min_size=1, max_size=20))
@example(SIGNATURE + b"\x21\x11\0\0", [3])
def test_any_octets_are_read_the_same_however_they_are_cut(octets: bytes, cuts: list[int]) -> None:
    """And a result is one that the parent takes."""
    pieces, start = [], 0
    for cut in [*cuts, len(octets)]:
        pieces.append(octets[start : start + cut])
        start += cut
    outcomes = []
    for division in ([octets], pieces, in_pieces(octets, 1)):
        try:
            reader, taken = read(division)
            outcomes.append((reader.done, reader.ends, taken))
        except InvalidProxyHeader as error:
            outcomes.append(("refused", str(error), 0))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    if outcomes[0][0] is True:
        proxied = Proxied(outcomes[0][1])
        assert decode_from_worker(proxied.encode()).encode() == proxied.encode()


ADDRESSES4 = st.ip_addresses(v=4)
ADDRESSES6 = st.ip_addresses(v=6)
PORTS = st.integers(0, 65535)
RESULTS = st.builds(
    lambda a, p, b, q: ProxyResultIPv4((a, p), (b, q)), ADDRESSES4, PORTS, ADDRESSES4, PORTS
) | st.builds(
    lambda a, p, b, q: ProxyResultIPv6((a, p), (b, q)), ADDRESSES6, PORTS, ADDRESSES6, PORTS
)


def assert_same(ends: Ends | None, result: ProxyResult) -> None:
    assert ends is not None
    kind = IPv4Address if isinstance(result, ProxyResultIPv4) else IPv6Address
    assert (kind(ends.client), ends.client_port) == result.source
    assert (kind(ends.server), ends.server_port) == result.dest


@given(RESULTS, st.dictionaries(st.integers(0xE0, 0xFF), st.binary(max_size=300), max_size=4))
def test_what_another_implementation_writes(result: ProxyResult, tlvs: dict[int, bytes]) -> None:
    line = ProxyProtocolV1().pack(result)
    reader, taken = read([line])
    assert taken == len(line)
    assert_same(reader.ends, result)
    binary = ProxyProtocolV2().pack(
        type(result)(
            result.source,
            result.dest,
            protocol=socket.SOCK_STREAM,
            tlv=ProxyProtocolTLV(init=tlvs),
        )
    )
    reader, taken = read([binary])
    assert taken == len(binary)
    assert_same(reader.ends, result)


def with_checksum(tlvs: bytes) -> bytes:
    """A header of version 2 whose checksum is right, as the specification has it reckoned."""
    body = b"\xc0\0\2\1\xc0\0\2\2\xdc\4\1\xbb" + tlvs
    whole = SIGNATURE + b"\x21\x11" + struct.pack("!H", len(body) + 7) + body + b"\3\0\4"
    return whole + struct.pack("!I", _crc32c(whole + bytes(4)))


@given(st.binary(max_size=50).map(lambda value: b"\xe0" + struct.pack("!H", len(value)) + value))
def test_a_right_checksum(tlv: bytes) -> None:
    reader, _ = read([with_checksum(tlv)])
    assert reader.ends == ENDS


@given(st.sampled_from([*range(16, 28), *range(31, 35)]), st.integers(0, 7))
def test_a_changed_bit_makes_it_a_wrong_one(octet: int, bit: int) -> None:
    header = bytearray(with_checksum(b""))
    header[octet] ^= 1 << bit
    with pytest.raises(InvalidProxyHeader, match="checksum"):
        read([bytes(header)])


def test_the_checksum_is_the_one_that_rfc_3720_shows() -> None:
    """Appendix B.4."""
    assert _crc32c(bytes(32)) == 0x8A9136AA
    assert _crc32c(b"\xff" * 32) == 0x62A8AB43
    assert _crc32c(bytes(range(32))) == 0x46DD794E
    assert _crc32c(b"123456789") == 0xE3069283


def test_an_address_has_one_form() -> None:
    """Of an address that a worker wrote in another one, the parent takes nothing."""
    octets = bytearray(Proxied(ENDS).encode())
    assert decode_from_worker(bytes(octets)) == Proxied(ENDS)
    octets[1] = 2
    with pytest.raises(Malformed):
        decode_from_worker(bytes(octets))
    octets[1] = 0
    with pytest.raises(Malformed):
        decode_from_worker(bytes(octets))
    mapped = ENDS._replace(client="::ffff:192.0.2.1")
    assert decode_from_worker(Proxied(mapped).encode()) == Proxied(ENDS)
