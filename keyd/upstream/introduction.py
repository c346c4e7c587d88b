"""Who has connected, as our own parent's PROXY header says: octets in, a name out; no I/O.

Run by a keyd that lends its keys. The parent writes the header, and keyd hears nobody else. The
name in it is a worker's word: the worker has verified the client's certificate. A worker that was
taken over can name any client that its virtual host knows.

The format: haproxy's proxy-protocol.txt, section 2. The name is in a TLV of a type that section 2.2
leaves to applications.
"""

import struct

from keyd.protocol import Malformed

__all__ = ["NAME_TLV", "client_name", "missing_octets"]

#: PP2_TYPE_MIN_CUSTOM, the first of those for applications.
NAME_TLV = 0xE0

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_HEAD = struct.Struct("!12sBBH")
_TLV = struct.Struct("!BH")
#: Version 2, and the command: the sender's own connection, or on behalf of another.
_LOCAL, _PROXY = 0x20, 0x21
#: By address family and transport: the octets of both addresses and ports. A client that has
#: connected by a unix socket has none.
_ADDRESS_OCTETS = {0x11: 12, 0x21: 36, 0x00: 0}
#: A certificate of 16 KiB, and what else a header has.
_MAX_OCTETS = _HEAD.size + 20 * 1024
_MAX_NAME_CHARACTERS = 64


def missing_octets(header: bytes) -> int:
    """How many octets a header lacks that begins so, as far as is known. Raises Malformed."""
    if not _SIGNATURE.startswith(header[: len(_SIGNATURE)]):
        raise Malformed("no PROXY header of version 2")
    if len(header) < _HEAD.size:
        return _HEAD.size - len(header)
    length: int = _HEAD.unpack_from(header)[-1]
    if _HEAD.size + length > _MAX_OCTETS:
        raise Malformed(f"a PROXY header of {_HEAD.size + length} octets")
    return _HEAD.size + length - len(header)


def client_name(header: bytes) -> str | None:
    """The name that a whole header has; "" without one, None if there is no client.

    Raises Malformed.
    """
    _, command, family, _ = _HEAD.unpack_from(header)
    if command == _LOCAL:
        return None
    if command != _PROXY or family not in _ADDRESS_OCTETS:
        raise Malformed(f"a PROXY header with command 0x{command:02x} and family 0x{family:02x}")
    at, name = _HEAD.size + _ADDRESS_OCTETS[family], b""
    if at > len(header):
        raise Malformed("a PROXY header without its addresses")
    while at < len(header):
        kind, length = _TLV.unpack(header[at : at + _TLV.size].ljust(_TLV.size, b"\xff"))
        at += _TLV.size + length
        if at > len(header):
            raise Malformed("a PROXY header with a field that runs past its end")
        if kind == NAME_TLV:
            if name:
                raise Malformed("a PROXY header with two names")
            name = header[at - length : at]
    text = name.decode("ascii", "replace")
    if len(text) > _MAX_NAME_CHARACTERS or not text.isprintable() or not text.isascii():
        raise Malformed("a PROXY header with a name that no client has")
    return text
