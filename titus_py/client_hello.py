"""The first message of a TLS connection, read for one thing: the server's name.

Run by the worker, on the first octets that its client sent: hostile. Bytes in,
value out; no I/O. The virtual host is chosen from this before OpenSSL sees an
octet, since OpenSSL settles the protocol version before its own callback for the
name is called: with it, a virtual host could not have versions of its own, nor
could pyOpenSSL's callback refuse a name. OpenSSL then reads the same octets and
judges all the rest of them.

RFC 8446 §4.1.2 (ClientHello) and §5.1 (records), RFC 6066 §3 (server_name).
"""

from typing import NamedTuple

__all__ = [
    "MAX_OCTETS",
    "Alert",
    "ClientHello",
    "Incomplete",
    "InvalidClientHello",
    "fatal_alert",
    "parse_client_hello",
]

#: The longest ClientHello that is read, and the most octets that its records may take.
MAX_MESSAGE_OCTETS = 16 * 1024
MAX_OCTETS = 64 * 1024

_HANDSHAKE = 22
_CLIENT_HELLO = 1
_RECORD_HEADER_OCTETS = 5
_MAX_RECORD_OCTETS = 16 * 1024
_MESSAGE_HEADER_OCTETS = 4
_SERVER_NAME = 0
_HOST_NAME = 0

_HTTP = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"CONNECT ", b"OPTIONS ", b"TRACE ",
         b"PATCH ", b"PRI ")  # fmt: skip


class Alert:
    """AlertDescription (RFC 8446 §6), as far as they are ours to send."""

    UNEXPECTED_MESSAGE = 10
    DECODE_ERROR = 50
    ILLEGAL_PARAMETER = 47
    UNRECOGNIZED_NAME = 112


class InvalidClientHello(ValueError):
    """Octets that do not start a TLS connection; ``alert`` is what to answer."""

    def __init__(self, reason: str, alert: int = Alert.DECODE_ERROR, http: bool = False) -> None:
        super().__init__(reason)
        self.alert = alert
        self.http = http


class Incomplete(Exception):
    """More octets are needed."""


class ClientHello(NamedTuple):
    """What was read: the name in lower case, or None where none was sent."""

    server_name: str | None


def fatal_alert(description: int) -> bytes:
    """The record that ends a connection before TLS has begun: seven octets."""
    return bytes((21, 3, 3, 0, 2, 2, description))


def parse_client_hello(octets: bytes) -> ClientHello:
    """Read all octets that have arrived so far.

    Raises Incomplete while the message has not arrived whole, InvalidClientHello as
    soon as it cannot become one.
    """
    return ClientHello(_server_name(_Reader(_message(octets))))


def _message(octets: bytes) -> bytes:
    """Put the message together from its records, of which there may be many."""
    message = bytearray()
    position = 0
    while True:
        _check_record_type(octets[position : position + 8], first=position == 0)
        header = octets[position : position + _RECORD_HEADER_OCTETS]
        if len(header) < _RECORD_HEADER_OCTETS:
            break
        if header[1] != 3:
            raise InvalidClientHello("not a TLS record", Alert.UNEXPECTED_MESSAGE)
        length = int.from_bytes(header[3:], "big")
        if not 0 < length <= _MAX_RECORD_OCTETS:
            raise InvalidClientHello(f"a record of {length} octets")
        position += _RECORD_HEADER_OCTETS
        message += octets[position : position + length]
        position += length
        if message and message[0] != _CLIENT_HELLO:
            reason = f"handshake message {message[0]} instead of a ClientHello"
            raise InvalidClientHello(reason, Alert.UNEXPECTED_MESSAGE)
        if len(message) >= _MESSAGE_HEADER_OCTETS:
            wanted = int.from_bytes(message[1:4], "big")
            if wanted > MAX_MESSAGE_OCTETS:
                reason = f"a ClientHello of {wanted} octets ({MAX_MESSAGE_OCTETS} are read)"
                raise InvalidClientHello(reason, Alert.ILLEGAL_PARAMETER)
            if len(message) >= _MESSAGE_HEADER_OCTETS + wanted:
                return bytes(message[_MESSAGE_HEADER_OCTETS : _MESSAGE_HEADER_OCTETS + wanted])
        if position >= len(octets):
            break
    if len(octets) >= MAX_OCTETS:
        reason = f"a ClientHello in more than {MAX_OCTETS} octets of records"
        raise InvalidClientHello(reason, Alert.ILLEGAL_PARAMETER)
    raise Incomplete


def _check_record_type(start: bytes, first: bool) -> None:
    if not start or start[0] == _HANDSHAKE:
        return
    if first and any(start.startswith(method[:8]) for method in _HTTP):
        raise InvalidClientHello("a plain HTTP request", http=True)
    if first and any(method.startswith(start) for method in _HTTP):
        raise Incomplete
    if first:
        raise InvalidClientHello("not TLS", Alert.UNEXPECTED_MESSAGE)
    reason = f"a record of type {start[0]} within the ClientHello"
    raise InvalidClientHello(reason, Alert.UNEXPECTED_MESSAGE)


class _Reader:
    """Takes fields off the front; what is missing is an InvalidClientHello."""

    __slots__ = ("_octets", "_position")

    def __init__(self, octets: bytes) -> None:
        self._octets = octets
        self._position = 0

    def take(self, length: int) -> bytes:
        end = self._position + length
        if end > len(self._octets):
            raise InvalidClientHello("a field runs past its end")
        field = self._octets[self._position : end]
        self._position = end
        return field

    def number(self, octets: int) -> int:
        return int.from_bytes(self.take(octets), "big")

    def vector(self, length_octets: int) -> bytes:
        return self.take(self.number(length_octets))

    def more(self) -> bool:
        return self._position < len(self._octets)


def _server_name(hello: _Reader) -> str | None:
    hello.take(2 + 32)  # legacy_version, random
    hello.vector(1)  # legacy_session_id
    hello.vector(2)  # cipher_suites
    hello.vector(1)  # legacy_compression_methods
    if not hello.more():
        return None
    extensions = _Reader(hello.vector(2))
    while extensions.more():
        kind = extensions.number(2)
        data = extensions.vector(2)
        if kind == _SERVER_NAME:
            return _host_name(_Reader(data))
    return None


def _host_name(data: _Reader) -> str:
    names = _Reader(data.vector(2))
    if names.number(1) != _HOST_NAME:
        raise InvalidClientHello("a server_name that is not a host name")
    name = names.vector(2)
    if not 0 < len(name) <= 255:
        raise InvalidClientHello(f"a server_name of {len(name)} octets")
    try:
        text = name.decode("ascii")
    except UnicodeDecodeError:
        raise InvalidClientHello("a server_name that is not ASCII") from None
    if not text.isprintable():
        raise InvalidClientHello("a server_name with control characters")
    return text.lower()
