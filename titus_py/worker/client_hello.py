"""The first message of a TLS connection, read for two things: the server's name, and protocols.

Run by the worker, on the first octets that its client sent: hostile. Octets in,
value out; no I/O. The virtual host is chosen by this name before OpenSSL sees an
octet. OpenSSL's own callback for the name comes too late: the protocol version is
settled by then, and a virtual host could not have versions of its own. Nor can
pyOpenSSL's callback refuse a name. OpenSSL then reads the same octets, and judges
the rest of them. The protocols are read only if the virtual host has some, so that a
client that it has none for is told so; which one is taken, OpenSSL settles (``alpn``).

RFC 8446 §4.1.2 (ClientHello) and §5.1 (records), RFC 6066 §3 (server_name), RFC 7301 §3.1
(application_layer_protocol_negotiation).
"""

from typing import NamedTuple

__all__ = [
    "MAX_MESSAGE_OCTETS",
    "MAX_RECORDS",
    "Alert",
    "ClientHello",
    "ClientHelloReader",
    "InvalidClientHello",
    "fatal_alert",
    "offered_protocols",
]

#: The longest ClientHello that there can be, without its header: 2 octets of version, 32 of
#: random, and four vectors at their longest. This is also OpenSSL's limit.
MAX_MESSAGE_OCTETS = 2 + 32 + (1 + 32) + (2 + 65534) + (1 + 255) + (2 + 65535)
#: How many records a ClientHello may be cut into; a usual one is in one. RFC 8446 §5.1 has no
#: limit, and neither has OpenSSL. But each record takes time, here and there, for as few as six
#: octets.
MAX_RECORDS = 512

_HANDSHAKE = 22
_CLIENT_HELLO = 1
_RECORD_HEADER_OCTETS = 5
_MAX_RECORD_OCTETS = 16 * 1024
_MESSAGE_HEADER_OCTETS = 4
#: Types of extensions, as they are sent.
_SERVER_NAME, _APPLICATION_LAYER_PROTOCOL_NEGOTIATION = b"\0\0", b"\0\x10"
_HOST_NAME = b"\0"
#: No name in the DNS is longer (RFC 1035 §2.3.4).
_MAX_NAME_OCTETS = 255

#: How HTTP requests begin: at most as many octets as a record's header has.
_HTTP = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELET", b"CONNE", b"OPTIO", b"TRACE", b"PATCH",
         b"PRI ")  # fmt: skip


class Alert:
    """The alerts that are sent here, and not by OpenSSL (AlertDescription, RFC 8446 §6)."""

    UNEXPECTED_MESSAGE = 10
    RECORD_OVERFLOW = 22
    ILLEGAL_PARAMETER = 47
    DECODE_ERROR = 50
    MISSING_EXTENSION = 109
    UNRECOGNIZED_NAME = 112
    NO_APPLICATION_PROTOCOL = 120


class InvalidClientHello(ValueError):
    """Octets that do not start a TLS connection; ``alert`` is what to answer."""

    def __init__(self, reason: str, alert: int = Alert.DECODE_ERROR, http: bool = False) -> None:
        super().__init__(reason)
        self.alert = alert
        self.http = http


class ClientHello(NamedTuple):
    """What was read: the name in lower case, or None where none was sent.

    ``octets`` are the message without its header.
    """

    server_name: str | None
    octets: bytes


def fatal_alert(description: int) -> bytes:
    """The record that ends a connection before TLS has begun: seven octets."""
    return bytes((21, 3, 3, 0, 2, 2, description))


class ClientHelloReader:
    """Puts one ClientHello together from octets as they come; looks at each octet once.

    The work is in proportion to the octets, however a client cuts the message into segments.
    """

    __slots__ = ("_end", "_header", "_left", "_message", "_records")

    def __init__(self) -> None:
        #: What has come of a record's header, and how much of its content is still to come.
        self._header = b""
        self._left = 0
        self._records = 0
        self._message = bytearray()
        #: Where the message ends, once its header is there.
        self._end = 0

    def feed(self, octets: bytes) -> ClientHello | None:
        """Take the next octets; returns None until the message is whole.

        Raises InvalidClientHello as soon as the octets cannot become a ClientHello.
        """
        message = self._message
        position = 0
        while position < len(octets):
            if not self._left:
                missing = _RECORD_HEADER_OCTETS - len(self._header)
                self._header += octets[position : position + missing]
                position += missing
                self._read_record_header()
                continue
            content = octets[position : position + self._left]
            position += len(content)
            self._left -= len(content)
            message += content
            if not self._end:
                self._read_message_header()
            if self._end and len(message) >= self._end:
                return _read_message(bytes(message[_MESSAGE_HEADER_OCTETS : self._end]))
        return None

    def _read_record_header(self) -> None:
        header = self._header
        if header[0] != _HANDSHAKE:
            self._refuse_record_type()
            return
        if header[1:2] not in (b"", b"\3"):
            raise InvalidClientHello("not a TLS record", Alert.UNEXPECTED_MESSAGE)
        if len(header) < _RECORD_HEADER_OCTETS:
            return
        length = int.from_bytes(header[3:], "big")
        if not length:
            raise InvalidClientHello("a record of 0 octets")
        if length > _MAX_RECORD_OCTETS:
            raise InvalidClientHello(f"a record of {length} octets", Alert.RECORD_OVERFLOW)
        self._records += 1
        if self._records > MAX_RECORDS:
            reason = f"a ClientHello in more than {MAX_RECORDS} records"
            raise InvalidClientHello(reason, Alert.UNEXPECTED_MESSAGE)
        self._left = length
        self._header = b""

    def _refuse_record_type(self) -> None:
        """Raise InvalidClientHello, unless more octets could show this to be an HTTP request."""
        start = self._header
        if self._message:
            reason = f"a record of type {start[0]} within the ClientHello"
            raise InvalidClientHello(reason, Alert.UNEXPECTED_MESSAGE)
        if any(start.startswith(method) for method in _HTTP):
            raise InvalidClientHello("a plain HTTP request", http=True)
        if not any(method.startswith(start) for method in _HTTP):
            raise InvalidClientHello("not TLS", Alert.UNEXPECTED_MESSAGE)

    def _read_message_header(self) -> None:
        message = self._message
        if message[0] != _CLIENT_HELLO:
            reason = f"handshake message {message[0]} instead of a ClientHello"
            raise InvalidClientHello(reason, Alert.UNEXPECTED_MESSAGE)
        if len(message) < _MESSAGE_HEADER_OCTETS:
            return
        length = int.from_bytes(message[1:_MESSAGE_HEADER_OCTETS], "big")
        if length > MAX_MESSAGE_OCTETS:
            reason = f"a ClientHello of {length} octets ({MAX_MESSAGE_OCTETS} are possible)"
            raise InvalidClientHello(reason, Alert.ILLEGAL_PARAMETER)
        self._end = _MESSAGE_HEADER_OCTETS + length


def offered_protocols(hello: ClientHello) -> tuple[bytes, ...] | None:
    """The names of the protocols that the client offers, or None if it does not negotiate one.

    Raises InvalidClientHello.
    """
    data = _extension(hello.octets, _APPLICATION_LAYER_PROTOCOL_NEGOTIATION)
    if data is None:
        return None
    names, end = _vector(data, 0, 2)
    at = 0
    protocols = []
    while at < len(names):
        name, at = _vector(names, at, 1)
        protocols.append(name)
    if end < len(data) or not all(protocols) or not protocols:
        raise InvalidClientHello("a malformed list of protocols")
    return tuple(protocols)


def _read_message(octets: bytes) -> ClientHello:
    data = _extension(octets, _SERVER_NAME)
    return ClientHello(None if data is None else _host_name(data), octets)


def _extension(octets: bytes, wanted: bytes) -> bytes | None:
    """What is in the first extension of this type; None: there is none."""
    at = 2 + 32  # legacy_version, random
    for length_octets in (1, 2, 1):  # legacy_session_id, cipher_suites, compression methods
        _, at = _vector(octets, at, length_octets)
    if at < len(octets):
        extensions, _ = _vector(octets, at, 2)
        at = 0
        while at < len(extensions):
            kind = extensions[at : at + 2]
            data, at = _vector(extensions, at + 2, 2)
            if kind == wanted:
                return data
    return None


def _vector(octets: bytes, at: int, length_octets: int) -> tuple[bytes, int]:
    """A field with its length in front, and where the next one begins. Raises InvalidClientHello.

    One call for each field: a client may send a dozen extensions, and waits meanwhile.
    """
    start = at + length_octets
    end = start + int.from_bytes(octets[at:start], "big")
    if start > len(octets) or end > len(octets):
        raise InvalidClientHello("a field runs past its end")
    return octets[start:end], end


def _host_name(data: bytes) -> str:
    names, _ = _vector(data, 0, 2)
    if not names:
        raise InvalidClientHello("a field runs past its end")
    if not names.startswith(_HOST_NAME):
        raise InvalidClientHello("a server_name that is not a host name")
    name, _ = _vector(names, len(_HOST_NAME), 2)
    if not name:
        raise InvalidClientHello("a server_name of 0 octets")
    # From here on: a field that can be decoded, but cannot be a name (RFC 8446 §6.2).
    if len(name) > _MAX_NAME_OCTETS:
        reason = f"a server_name of {len(name)} octets"
        raise InvalidClientHello(reason, Alert.ILLEGAL_PARAMETER)
    if not name.isascii():
        raise InvalidClientHello("a server_name that is not ASCII", Alert.ILLEGAL_PARAMETER)
    text = name.decode("ascii")
    if not text.isprintable():
        reason = "a server_name with control characters"
        raise InvalidClientHello(reason, Alert.ILLEGAL_PARAMETER)
    return text.lower()
