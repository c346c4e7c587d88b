"""A ClientHello that is malformed, in each extension and each field: what it gets for that.

``section`` is where RFC 8446 says so, unless it names another RFC. §6.2 is the list of alerts: a
length that is wrong is decode_error, a value that is wrong is illegal_parameter. A remark says
where OpenSSL does something else than that, or than the RFC would rather have.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from integration.instance import Instance

from .client import NAMES, TLS12, TLS13, Client, Version, vector
from .client import Extension as E
from .outcome import SERVED, outcome

X25519, P256, P384 = b"\x00\x1d", b"\x00\x17", b"\x00\x18"
RSA_PSS, ECDSA, RSA_SHA1, UNKNOWN = b"\x08\x04", b"\x04\x03", b"\x02\x01", b"\xfa\xfa"
NAME = b"\0" + vector(2, b"localhost")

DECODE_ERROR, ILLEGAL_PARAMETER = "decode_error", "illegal_parameter"
MISSING_EXTENSION, UNRECOGNIZED_NAME = "missing_extension", "unrecognized_name"
PROTOCOL_VERSION, HANDSHAKE_FAILURE = "protocol_version", "handshake_failure"


class Body(NamedTuple):
    """An extension with this body, or without the extension (None)."""

    kind: E
    what: str
    body: bytes | None
    section: str
    expected: str
    remark: str = ""


def share(group: bytes, key: bytes) -> bytes:
    return vector(2, group + vector(2, key))


def identities(number: int) -> bytes:
    return vector(2, number * (vector(2, b"ticket") + bytes(4)))


#: A pre_shared_key: a ticket of nobody's.
KEYS = identities(1) + vector(2, vector(1, bytes(32)))

EXTENSIONS_13 = [
    Body(E.SUPPORTED_VERSIONS, "no body", b"", "6.2", PROTOCOL_VERSION, "not decode_error"),
    Body(E.SUPPORTED_VERSIONS, "none", b"\0", "6.2", PROTOCOL_VERSION, "not decode_error"),
    Body(E.SUPPORTED_VERSIONS, "odd", b"\3\3\4\3", "6.2", PROTOCOL_VERSION, "not decode_error"),
    Body(E.SUPPORTED_VERSIONS, "cut", b"\4\3\4", "6.2", PROTOCOL_VERSION, "not decode_error"),
    Body(E.SUPPORTED_VERSIONS, "too long", b"\2\3\4\0", "6.2", PROTOCOL_VERSION,
         "not decode_error"),
    Body(E.SUPPORTED_VERSIONS, "unknown", b"\2\3\5", "4.2.1", PROTOCOL_VERSION),
    Body(E.SUPPORTED_VERSIONS, "TLS 1.0", b"\2\3\1", "4.2.1", PROTOCOL_VERSION),
    Body(E.SUPPORTED_VERSIONS, "unknown, and 1.3", b"\4\x7a\x7a\3\4", "4.2.1", SERVED),
    Body(E.KEY_SHARE, "no body", b"", "6.2", DECODE_ERROR),
    Body(E.KEY_SHARE, "cut", b"\0\x24\0\x1d\0\x20abc", "6.2", DECODE_ERROR),
    Body(E.KEY_SHARE, "a share cut", vector(2, X25519 + b"\0\x20abc"), "6.2", DECODE_ERROR),
    Body(E.KEY_SHARE, "too long", share(X25519, bytes(31) + b"\1") + b"\0", "6.2", DECODE_ERROR),
    Body(E.KEY_SHARE, "an empty key", share(X25519, b""), "4.2.8", DECODE_ERROR),
    Body(E.KEY_SHARE, "31 octets", share(X25519, bytes(30) + b"\1"), "4.2.8", ILLEGAL_PARAMETER),
    Body(E.KEY_SHARE, "all zeros", share(X25519, bytes(32)), "7.4.2", ILLEGAL_PARAMETER),
    Body(E.KEY_SHARE, "off the curve", share(P256, b"\4" + b"\1" * 64), "4.2.8.2",
         ILLEGAL_PARAMETER),
    Body(E.KEY_SHARE, "compressed", share(P256, b"\2" + b"\1" * 32), "4.2.8.2", ILLEGAL_PARAMETER),
    Body(E.KEY_SHARE, "not a group", share(P384, bytes(97)), "4.2.8", ILLEGAL_PARAMETER),
    Body(E.KEY_SHARE, "not there", None, "9.2", MISSING_EXTENSION),
    Body(E.SUPPORTED_GROUPS, "no body", b"", "6.2", DECODE_ERROR),
    Body(E.SUPPORTED_GROUPS, "none", b"\0\0", "6.2", DECODE_ERROR),
    Body(E.SUPPORTED_GROUPS, "odd", vector(2, X25519 + b"\0"), "6.2", DECODE_ERROR),
    Body(E.SUPPORTED_GROUPS, "cut", b"\0\4" + X25519, "6.2", DECODE_ERROR),
    Body(E.SUPPORTED_GROUPS, "too long", vector(2, X25519) + b"\0", "6.2", DECODE_ERROR),
    Body(E.SUPPORTED_GROUPS, "not the share's", vector(2, UNKNOWN), "4.2.8", ILLEGAL_PARAMETER),
    Body(E.SUPPORTED_GROUPS, "not there", None, "9.2", MISSING_EXTENSION),
    Body(E.SIGNATURE_ALGORITHMS, "not there", None, "4.2.3", MISSING_EXTENSION),
    Body(E.SIGNATURE_ALGORITHMS, "SHA-1", vector(2, RSA_SHA1), "4.2.3", HANDSHAKE_FAILURE),
    Body(E.PSK_KEY_EXCHANGE_MODES, "no body", b"", "6.2", DECODE_ERROR),
    Body(E.PSK_KEY_EXCHANGE_MODES, "none", b"\0", "6.2", DECODE_ERROR),
    Body(E.PSK_KEY_EXCHANGE_MODES, "cut", b"\2\1", "6.2", DECODE_ERROR),
    Body(E.PSK_KEY_EXCHANGE_MODES, "too long", b"\1\1\0", "6.2", DECODE_ERROR),
    Body(E.PSK_KEY_EXCHANGE_MODES, "unknown", b"\1\7", "4.2.9", SERVED),
    Body(E.PSK_KEY_EXCHANGE_MODES, "not there", None, "4.2.9", SERVED),
    Body(E.EARLY_DATA, "a body", b"\0", "4.2.10", DECODE_ERROR),
    Body(E.POST_HANDSHAKE_AUTH, "a body", b"\0", "4.2.6", DECODE_ERROR),
    Body(E.POST_HANDSHAKE_AUTH, "no body", b"", "4.2.6", SERVED),
    Body(E.COOKIE, "cut", b"\0\4\0", "4.2.2", SERVED, "there was none to send back: ignored"),
    Body(E.PRE_SHARED_KEY, "no body", b"", "6.2", DECODE_ERROR),
    Body(E.PRE_SHARED_KEY, "cut", b"\0\x08", "6.2", DECODE_ERROR),
    Body(E.PRE_SHARED_KEY, "a ticket of nobody's", KEYS, "4.2.11", SERVED),
    Body(E.PRE_SHARED_KEY, "fewer binders", identities(2) + vector(2, vector(1, bytes(32))),
         "4.2.11", SERVED, "looked at only where one of them is known"),
]  # fmt: skip

#: In both versions.
EXTENSIONS = [
    Body(E.SIGNATURE_ALGORITHMS, "no body", b"", "6.2", DECODE_ERROR),
    Body(E.SIGNATURE_ALGORITHMS, "none", b"\0\0", "6.2", DECODE_ERROR),
    Body(E.SIGNATURE_ALGORITHMS, "odd", vector(2, RSA_PSS + b"\4"), "6.2", DECODE_ERROR),
    Body(E.SIGNATURE_ALGORITHMS, "cut", b"\0\4" + RSA_PSS, "6.2", DECODE_ERROR),
    Body(E.SIGNATURE_ALGORITHMS, "too long", vector(2, RSA_PSS) + b"\0", "6.2", DECODE_ERROR),
    Body(E.SIGNATURE_ALGORITHMS, "unknown", vector(2, UNKNOWN), "4.4.2.2", HANDSHAKE_FAILURE),
    Body(E.SIGNATURE_ALGORITHMS, "for other keys", vector(2, ECDSA), "4.4.2.2", HANDSHAKE_FAILURE),
    Body(E.SIGNATURE_ALGORITHMS_CERT, "no body", b"", "6.2", DECODE_ERROR),
    Body(E.SIGNATURE_ALGORITHMS_CERT, "none", b"\0\0", "6.2", DECODE_ERROR),
    Body(E.SIGNATURE_ALGORITHMS_CERT, "odd", vector(2, RSA_PSS + b"\4"), "6.2", DECODE_ERROR),
    Body(E.SERVER_NAME, "no body", b"", "RFC 6066 3", DECODE_ERROR),
    Body(E.SERVER_NAME, "none", b"\0\0", "RFC 6066 3", DECODE_ERROR),
    Body(E.SERVER_NAME, "cut", b"\0\x0e\0\0\x09loc", "6.2", DECODE_ERROR),
    Body(E.SERVER_NAME, "too long", vector(2, NAME) + b"\0", "6.2", DECODE_ERROR),
    Body(E.SERVER_NAME, "of another type", vector(2, b"\1" + NAME[1:]), "RFC 6066 3", DECODE_ERROR),
    Body(E.SERVER_NAME, "two", vector(2, 2 * NAME), "RFC 6066 3", DECODE_ERROR),
    Body(E.SERVER_NAME, "an empty name", vector(2, b"\0\0\0"), "RFC 6066 3", DECODE_ERROR),
    Body(E.SERVER_NAME, "with NUL", vector(2, b"\0" + vector(2, b"local\0")), "6.2",
         ILLEGAL_PARAMETER),
    Body(E.SERVER_NAME, "not ASCII", vector(2, b"\0" + vector(2, b"\xe9")), "6.2",
         ILLEGAL_PARAMETER),
    Body(E.SERVER_NAME, "256 octets", vector(2, b"\0" + vector(2, b"x" * 256)), "6.2",
         ILLEGAL_PARAMETER),
    Body(E.SERVER_NAME, "nobody's", vector(2, b"\0" + vector(2, b"other")), "RFC 6066 3",
         UNRECOGNIZED_NAME),
    Body(E.SERVER_NAME, "not there", None, "9.2", MISSING_EXTENSION),
    Body(E.ALPN, "no body", b"", "RFC 7301 3.1", DECODE_ERROR),
    Body(E.ALPN, "none", b"\0\0", "RFC 7301 3.1", DECODE_ERROR),
    Body(E.ALPN, "an empty name", b"\0\1\0", "RFC 7301 3.1", DECODE_ERROR),
    Body(E.ALPN, "cut", b"\0\5\2h2", "6.2", DECODE_ERROR),
    Body(E.ALPN, "too long", b"\0\3\2h2\0", "6.2", DECODE_ERROR),
    Body(E.ALPN, "not spoken here", b"\0\3\2h2", "RFC 7301 3.2", SERVED),
    Body(E.MAX_FRAGMENT_LENGTH, "no body", b"", "6.2", DECODE_ERROR),
    Body(E.MAX_FRAGMENT_LENGTH, "two", b"\1\1", "6.2", DECODE_ERROR),
    Body(E.MAX_FRAGMENT_LENGTH, "unknown", b"\5", "RFC 6066 4", ILLEGAL_PARAMETER),
    Body(E.MAX_FRAGMENT_LENGTH, "512", b"\1", "RFC 6066 4", SERVED),
    Body(E.STATUS_REQUEST, "no body", b"", "RFC 6066 8", DECODE_ERROR),
    Body(E.STATUS_REQUEST, "cut", b"\1\0", "6.2", DECODE_ERROR),
    Body(E.STATUS_REQUEST, "too long", b"\1\0\0\0\0\0", "6.2", DECODE_ERROR),
    Body(E.STATUS_REQUEST, "unknown", b"\2", "RFC 6066 8", SERVED),
    Body(E.USE_SRTP, "no body", b"", "6.2", ILLEGAL_PARAMETER, "not decode_error"),
    Body(E.PADDING, "not zeros", b"abc", "RFC 7685 3", SERVED, "which it may refuse"),
    Body(E.GREASE, "a body", b"abc", "RFC 8701 3", SERVED),
]  # fmt: skip

EXTENSIONS_12 = [
    Body(E.SUPPORTED_GROUPS, "no body", b"", "RFC 8422 5.1.1", DECODE_ERROR),
    Body(E.SUPPORTED_GROUPS, "none", b"\0\0", "RFC 8422 5.1.1", DECODE_ERROR),
    Body(E.SUPPORTED_GROUPS, "odd", vector(2, X25519 + b"\0"), "RFC 8422 5.1.1", DECODE_ERROR),
    Body(E.SUPPORTED_GROUPS, "unknown", vector(2, UNKNOWN), "RFC 8422 5.1", HANDSHAKE_FAILURE),
    Body(E.EC_POINT_FORMATS, "no body", b"", "RFC 8422 5.1.2", DECODE_ERROR),
    Body(E.EC_POINT_FORMATS, "none", b"\0", "RFC 8422 5.1.2", DECODE_ERROR),
    Body(E.EC_POINT_FORMATS, "no uncompressed", b"\1\1", "RFC 8422 5.1.2", SERVED,
         "not illegal_parameter: X25519 has no formats"),
    Body(E.EXTENDED_MASTER_SECRET, "a body", b"\0", "RFC 7627 5.1", DECODE_ERROR),
    Body(E.RENEGOTIATION_INFO, "no body", b"", "RFC 5746 3.2", DECODE_ERROR),
    Body(E.RENEGOTIATION_INFO, "at first", b"\1x", "RFC 5746 3.6", HANDSHAKE_FAILURE),
    Body(E.KEY_SHARE, "TLS 1.3's", b"", "4.2", SERVED),
    Body(E.SUPPORTED_VERSIONS, "TLS 1.0 and 1.1", b"\4\3\1\3\2", "4.2.1", PROTOCOL_VERSION),
]  # fmt: skip


class Hello(NamedTuple):
    """What is wrong with it otherwise."""

    what: str
    version: Version
    section: str
    expected: str
    hello: Callable[[Client], bytes]


def having(**fields: Any) -> Callable[[Client], bytes]:
    return lambda client: client.hello(**fields)


def twice(client: Client, kind: E) -> bytes:
    """All extensions, and this one again."""
    once = client.extensions()
    again = kind.to_bytes(2, "big") + vector(2, once[kind])
    return client.hello(extensions=client.encoded(once) + again)


def two_shares(client: Client) -> bytes:
    return client.hello({E.KEY_SHARE: vector(2, 2 * (X25519 + vector(2, client.share)))})


def pre_shared_key_first(client: Client) -> bytes:
    return client.hello(extensions=client.encoded({E.PRE_SHARED_KEY: KEYS, **client.extensions()}))


FIELDS = [
    Hello("legacy_version 3.4", TLS13, "4.1.2", SERVED, having(version=b"\3\4")),
    Hello("SSL 3.0", TLS13, "D.5", PROTOCOL_VERSION, having(version=b"\3\0")),
    Hello("version 2.0", TLS12, "RFC 5246 E.1", PROTOCOL_VERSION, having(version=b"\2\0")),
    Hello("version 3.4", TLS12, "RFC 5246 E.1", SERVED, having(version=b"\3\4")),
    Hello("33 octets of session", TLS13, "4.1.2", DECODE_ERROR, having(session=bytes(33))),
    Hello("33 octets of session", TLS12, "RFC 5246 7.4.1.2", DECODE_ERROR,
          having(session=bytes(33))),
    Hello("no suites", TLS13, "4.1.2", DECODE_ERROR, having(suites=b"")),
    Hello("no suites", TLS12, "RFC 5246 7.4.1.2", DECODE_ERROR, having(suites=b"")),
    Hello("odd suites", TLS13, "6.2", DECODE_ERROR, having(suites=b"\x13\1\x13")),
    Hello("unknown suites", TLS13, "4.1.2", HANDSHAKE_FAILURE, having(suites=UNKNOWN)),
    Hello("suites of TLS 1.2", TLS13, "4.1.2", HANDSHAKE_FAILURE, having(suites=b"\xc0\x2f")),
    Hello("a needless fallback", TLS12, "RFC 7507 3", "inappropriate_fallback",
          having(suites=b"\xc0\x2f\x56\0")),
    Hello("no compression methods", TLS13, "4.1.2", DECODE_ERROR, having(compression=b"")),
    Hello("no compression methods", TLS12, "RFC 5246 7.4.1.2", DECODE_ERROR,
          having(compression=b"")),
    Hello("compression", TLS13, "4.1.2", ILLEGAL_PARAMETER, having(compression=b"\0\1")),
    Hello("compression", TLS12, "RFC 5246 7.4.1.2", SERVED, having(compression=b"\0\1")),
    # Which RFC 5246 leaves open.
    Hello("not without compression", TLS12, "RFC 5246 7.4.1.2", ILLEGAL_PARAMETER,
          having(compression=b"\1")),
    Hello("more behind it", TLS13, "6.2", DECODE_ERROR, having(behind=b"\0")),
    Hello("more behind it", TLS12, "RFC 5246 7.4.1.2", DECODE_ERROR, having(behind=b"\0")),
    Hello("no extensions", TLS12, "9.2", MISSING_EXTENSION, having(extensions=b"")),
    Hello("an extension cut", TLS13, "6.2", DECODE_ERROR, having(extensions=b"\0\0\0")),
    Hello("server_name twice", TLS13, "4.2", ILLEGAL_PARAMETER, lambda c: twice(c, E.SERVER_NAME)),
    Hello("key_share twice", TLS13, "4.2", ILLEGAL_PARAMETER, lambda c: twice(c, E.KEY_SHARE)),
    Hello("supported_groups twice", TLS12, "4.2", ILLEGAL_PARAMETER,
          lambda c: twice(c, E.SUPPORTED_GROUPS)),
    # OpenSSL takes the first. §4.2.8 lets it.
    Hello("two shares of a group", TLS13, "4.2.8", SERVED, two_shares),
    Hello("pre_shared_key not the last", TLS13, "4.2.11", ILLEGAL_PARAMETER, pre_shared_key_first),
    Hello("pre_shared_key without modes", TLS13, "4.2.9", MISSING_EXTENSION,
          having(changed={E.PSK_KEY_EXCHANGE_MODES: None, E.PRE_SHARED_KEY: KEYS})),
]  # fmt: skip


HELLOS = FIELDS + [
    Hello(f"{row.kind.name.lower()}: {row.what}", version, row.section, row.expected,
          having(changed={row.kind: row.body}))
    for version, table in ((TLS13, EXTENSIONS_13 + EXTENSIONS), (TLS12, EXTENSIONS_12 + EXTENSIONS))
    for row in table
]  # fmt: skip


def name_of(row: Hello) -> str:
    return f"{row.what} ({NAMES[row.version]})"


def comes_of(instance: Instance, row: Hello, segment: int | None = None) -> str:
    def converse(client: Client) -> None:
        client.start(row.hello(client))
        client.finish()

    with Client(instance.port, row.version) as client:
        client.segments.size = segment
        return outcome(client, converse)


@pytest.mark.parametrize("row", HELLOS, ids=name_of)
def test_a_malformed_client_hello_gets_its_alert(instance: Instance, row: Hello) -> None:
    assert comes_of(instance, row) == row.expected, row.section


@pytest.mark.parametrize("row", FIELDS, ids=name_of)
def test_one_in_segments_of_an_octet_gets_the_same(instance: Instance, row: Hello) -> None:
    assert comes_of(instance, row, segment=1) == row.expected, row.section


@pytest.mark.parametrize("version", [TLS12, TLS13])
def test_the_longest_client_hello_there_is_is_served(instance: Instance, version: Version) -> None:
    """§4.1.2: every vector at its longest, but that TLS 1.3 has one compression method alone."""

    def longest(client: Client) -> bytes:
        wanted = client.extensions()
        room = 0xFFFF - len(client.encoded(wanted)) - 4
        unknown = b"".join((0xD000 + number % 0xFFF).to_bytes(2, "big") for number in range(32766))
        return client.hello(
            {E.GREASE: bytes(room)},
            suites=client.suite.to_bytes(2, "big") + unknown,
            compression=bytes(range(255)) if version == TLS12 else b"\0",
        )

    with Client(instance.port, version) as client:
        hello = longest(client)
        assert len(hello) == 4 + 131_396 - (0 if version == TLS12 else 254)

        def converse(client: Client) -> None:
            client.start(hello)
            client.finish()

        assert outcome(client, converse) == SERVED
