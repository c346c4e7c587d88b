"""What a backend is told of its client, as a parser that is not ours reads it."""

import socket
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxyprotocol.result import ProxyResult
from proxyprotocol.tlv import SSLClient
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from keyd.upstream.introduction import client_name, missing_octets
from titus_py.between.client_allow import Facts
from titus_py.between.client_identity import Identity
from titus_py.between.messages import Ends, TlsFacts
from titus_py.parent.introduction import introduce
from titus_py.parent.proxy_header import CannotEncode, version_1, version_2, without_client

NAMES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=255)
ADDRESSES = st.ip_addresses().map(str) | st.ip_addresses(v=4).map("::ffff:{}".format)
ENDS = st.builds(Ends, ADDRESSES, st.integers(0, 65535), ADDRESSES, st.integers(0, 65535))
FACTS = st.builds(
    TlsFacts,
    st.sampled_from(["TLSv1.2", "TLSv1.3"]),
    st.sampled_from(["TLS_AES_256_GCM_SHA384", "ECDHE-RSA-AES128-GCM-SHA256"]),
    NAMES,
)

ENDS_HERE = Ends("192.0.2.1", 1, "192.0.2.2", 443)
FACTS_HERE = TlsFacts("TLSv1.3", "TLS_AES_256_GCM_SHA384", "www.example.org")


def plain(address: str) -> IPv4Address | IPv6Address:
    number = ip_address(address)
    mapped = number.ipv4_mapped if isinstance(number, IPv6Address) else None
    return mapped or number


def assert_has(result: ProxyResult, ends: Ends) -> None:
    addresses = [plain(ends.client), plain(ends.server)]
    read = [result.source[0], result.dest[0]]
    assert [plain(str(address)) for address in read] == addresses
    assert len({address.version for address in read}) == 1
    # IPv6 is for those that IPv4 cannot name.
    assert read == addresses or {address.version for address in addresses} == {4, 6}
    assert (result.source[1], result.dest[1]) == (ends.client_port, ends.server_port)


@given(ENDS)
def test_version_1(ends: Ends) -> None:
    octets = version_1(ends)
    assert len(octets) <= 107
    assert_has(ProxyProtocolV1().unpack(octets), ends)


@given(ENDS, st.none() | FACTS, st.none() | NAMES.filter(bool))
def test_version_2(ends: Ends, facts: TlsFacts | None, protocol: str | None) -> None:
    octets = version_2(ends, facts, protocol)
    result = ProxyProtocolV2().unpack(octets)
    assert_has(result, ends)
    assert result.protocol == socket.SOCK_STREAM
    tlv = result.tlv
    assert tlv.alpn == (protocol.encode() if protocol else None)
    if facts is None:
        assert not tlv.authority
        assert not tlv.ssl
        return
    assert tlv.authority == (facts.server_name or None)
    assert tlv.ssl.client == SSLClient.PP2_CLIENT_SSL
    assert tlv.ssl.verify != 0, "that would say that a client's certificate is good"
    assert (tlv.ssl.version, tlv.ssl.cipher) == (facts.version, facts.cipher_suite)


IDENTITY = Identity(Facts((), (), ("alice", "staff"), "00" * 32), (), b"DER of a certificate")


@given(ENDS, FACTS, st.none() | NAMES.filter(bool))
def test_version_2_with_a_certificate(ends: Ends, facts: TlsFacts, protocol: str | None) -> None:
    octets = version_2(ends, facts, protocol, IDENTITY)
    result = ProxyProtocolV2().unpack(octets)
    assert_has(result, ends)
    ssl = result.tlv.ssl
    shown = SSLClient.PP2_CLIENT_CERT_CONN | SSLClient.PP2_CLIENT_CERT_SESS
    assert ssl.client == SSLClient.PP2_CLIENT_SSL | shown
    assert ssl.verify == 0
    assert ssl.cn == "alice"
    assert ssl[0x28] == b"DER of a certificate"
    assert (ssl.version, ssl.cipher) == (facts.version, facts.cipher_suite)


def test_a_certificate_without_a_common_name() -> None:
    nobody = IDENTITY._replace(facts=Facts(("a.example.org",), (), (), "00" * 32))
    octets = version_2(ENDS_HERE, FACTS_HERE, None, nobody)
    assert ProxyProtocolV2().unpack(octets).tlv.ssl.get(0x22) is None


def test_a_certificate_that_is_not_there_as_a_whole_is_not_told() -> None:
    with pytest.raises(CannotEncode, match="certificate is too long"):
        version_2(ENDS_HERE, FACTS_HERE, None, IDENTITY._replace(certificate=b""))


def test_what_no_length_in_a_header_can_say_is_not_told() -> None:
    """The whole header has no room for it, or the field of TLS, or the certificate's own."""
    fits = []
    for octets in (*range(65_400, 65_540), 1 << 20):
        certificate = bytes(octets)
        with suppress(CannotEncode):
            whole = IDENTITY._replace(certificate=certificate)
            told = version_2(ENDS_HERE, FACTS_HERE, None, whole)
            assert ProxyProtocolV2().unpack(told).tlv.ssl[0x28] == certificate
            fits.append(octets)
    assert fits == list(range(65_400, fits[-1] + 1))
    assert fits[-1] < 65_500


def test_a_chain_that_is_not_whole_is_of_no_interest() -> None:
    told = version_2(ENDS_HERE, FACTS_HERE, None, IDENTITY._replace(links=(), complete=False))
    assert told == version_2(ENDS_HERE, FACTS_HERE, None, IDENTITY)


@pytest.mark.parametrize(
    ("how", "version", "name", "certificate"),
    [("v2", None, None, False), ("v2-tls", "TLSv1.3", "h2", False),
     ("v2-tls-cert", "TLSv1.3", "h2", True)],
)  # fmt: skip
def test_a_backend_is_told_what_was_asked_for_and_no_more(
    how: str, version: str | None, name: str | None, certificate: bool
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert introduce(ours, how, ENDS_HERE, FACTS_HERE, "h2", IDENTITY) == ""
        tlv = ProxyProtocolV2().unpack(theirs.recv(4096)).tlv
    assert (tlv.alpn or b"").decode() == (name or "")
    assert (tlv.ssl.version if tlv.ssl else None) == version
    assert bool(tlv.ssl and tlv.ssl.get(0x28)) == certificate


@pytest.mark.parametrize("how", ["v2", "v2-tls", "v2-tls-cert"])
def test_the_name_of_a_known_client_goes_with_its_certificate(how: str) -> None:
    """As a keyd that lends keys reads it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert introduce(ours, how, ENDS_HERE, FACTS_HERE, "h2", IDENTITY, "web-1") == ""
        header = theirs.recv(65536)
    assert missing_octets(header) == 0
    assert client_name(header) == ("web-1" if how == "v2-tls-cert" else "")
    assert ProxyProtocolV2().unpack(header).tlv.alpn == (b"h2" if how != "v2" else None)


def test_a_health_check_has_no_name() -> None:
    assert client_name(without_client("v2-tls-cert")) is None


def test_an_interface_stays_at_home() -> None:
    ends = Ends("fe80::1%eth0", 5, "fe80::2%eth0", 443)
    assert version_1(ends) == b"PROXY TCP6 fe80::1 fe80::2 5 443\r\n"


@pytest.mark.parametrize("encode", [version_1, version_2])
def test_what_is_no_address_is_not_sent(encode: object) -> None:
    with pytest.raises(CannotEncode, match="'nowhere' is no IP address"):
        encode(Ends("127.0.0.1", 1, "nowhere", 2))


def test_what_cannot_be_encoded_is_not_written() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        assert introduce(ours, "v1", ENDS_HERE._replace(client="?"), None, None, None).startswith(
            "PROXY header: '?' is no"
        )
        ours.close()
        assert theirs.recv(1) == b""


def test_a_backend_without_room_is_a_failure() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                ours.send(bytes(65536))
        why = introduce(ours, "v2", ENDS_HERE, None, None, None)
        assert why == "PROXY header: Resource temporarily unavailable"


class _WithLittleRoom(socket.socket):
    """Takes ten octets at a time: of one segment, this kernel takes all or nothing."""

    def send(self, octets: bytes, flags: int = 0) -> int:  # type: ignore[override]
        return super().send(octets[:10], flags)


def test_a_part_of_a_header_is_a_failure() -> None:
    ours, theirs = socket.socketpair()
    with theirs, _WithLittleRoom(fileno=ours.detach()) as backend:
        why = introduce(backend, "v2", ENDS_HERE, None, None, None)
        assert why == "PROXY header: 10 of 28 octets were taken"


def test_a_backend_that_is_gone_is_a_failure() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        assert introduce(ours, "v2", ENDS_HERE, None, None, None) == "PROXY header: Broken pipe"
