"""How much of a client's first octets is its ClientHello. Run by the parent, on octets of clients.

The octets are looked at, and stay in the socket. Read are lengths, and the types that say that a
length follows; what is in the message, keyd reads. Octets in, value out; no I/O.

RFC 8446 §4 (messages), §5.1 (records); the PROXY header: haproxy's proxy-protocol.txt, section 2.
"""

from typing import NamedTuple

from keyd.protocol import MAX_CLIENT_HELLO_OCTETS

__all__ = ["MAX_RECORDS", "NOTHING", "FirstFlight", "look"]

#: As many as a worker reads (``worker.client_hello``).
MAX_RECORDS = 512

_HANDSHAKE, _MAJOR_VERSION = 22, 3
_CLIENT_HELLO = 1
_RECORD_HEADER_OCTETS = 5
_MAX_RECORD_OCTETS = 16 * 1024
_MESSAGE_HEADER_OCTETS = 4

_LINE_START, _LINE_END = b"PROXY ", b"\n"
_MIN_LINE_OCTETS, _MAX_LINE_OCTETS = len(b"PROXY UNKNOWN\r\n"), 107
_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_HEAD_OCTETS = 16


class FirstFlight(NamedTuple):
    """What can be said of a client's first octets.

    ``needs`` is how many there have to be for more to be said; 0: it is all said. ``client_hello``
    is then the message with its header, or empty if it is not one that a worker would read.
    ``after_header`` is whether a load balancer's header has come, if there is to be one.
    """

    needs: int
    client_hello: bytes = b""
    after_header: bool = False


#: Octets that are not TLS.
NOTHING = FirstFlight(0)


def look(octets: bytes, header: bool = False) -> FirstFlight:
    """Look at all that has come so far; ``header``: a load balancer's header comes first."""
    if not header:
        return _client_hello(octets, 0)
    length = _header_length(octets)
    if not 0 < length <= len(octets):
        return FirstFlight(length)
    return _client_hello(octets, length)._replace(after_header=True)


def _client_hello(octets: bytes, start: int) -> FirstFlight:
    message = bytearray()
    end = _MESSAGE_HEADER_OCTETS
    for _ in range(MAX_RECORDS):
        content = start + _RECORD_HEADER_OCTETS
        header = octets[start:content]
        if not bytes((_HANDSHAKE, _MAJOR_VERSION)).startswith(header[:2]):
            return NOTHING
        if len(header) < _RECORD_HEADER_OCTETS:
            return FirstFlight(content)
        length = int.from_bytes(header[3:], "big")
        if not 0 < length <= _MAX_RECORD_OCTETS:
            return NOTHING
        # What follows the message is none of its octets.
        missing = end - len(message)
        message += octets[content : content + length]
        if end == _MESSAGE_HEADER_OCTETS and len(message) >= end:
            if message[0] != _CLIENT_HELLO:
                return NOTHING
            body = int.from_bytes(message[1:_MESSAGE_HEADER_OCTETS], "big")
            end += body
            missing += body
            if end > MAX_CLIENT_HELLO_OCTETS:
                return NOTHING
        if len(message) >= end:
            return FirstFlight(0, bytes(message[:end]))
        start = content + min(length, missing)
        if len(octets) < start:
            return FirstFlight(start)
    return NOTHING


def _header_length(octets: bytes) -> int:
    """How long the header is, or more than there are octets if that takes more; 0: it is none."""
    if octets.startswith(_LINE_START):
        end = octets.find(_LINE_END, 0, _MAX_LINE_OCTETS) + len(_LINE_END)
        if not end and len(octets) < _MAX_LINE_OCTETS:
            return max(_MIN_LINE_OCTETS, len(octets) + 1)
        return end
    if octets and _LINE_START.startswith(octets):
        return len(_LINE_START)
    if not _SIGNATURE.startswith(octets[: len(_SIGNATURE)]):
        return 0
    if len(octets) < _HEAD_OCTETS:
        return _HEAD_OCTETS
    return _HEAD_OCTETS + int.from_bytes(octets[14:_HEAD_OCTETS], "big")
