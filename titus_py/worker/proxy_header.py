"""The PROXY header of a load balancer, read for two addresses and ports.

Run by the worker, on octets of a peer that the configuration lists as a load balancer, before any
of the client's. Imported only where a listener takes such peers. Octets in, value out; no I/O.

The format: haproxy's proxy-protocol.txt, section 2.
"""

import socket
import struct

from titus_py.between.messages import Ends

__all__ = ["InvalidProxyHeader", "ProxyHeaderReader"]

_LINE_START = b"PROXY "
_MAX_LINE_OCTETS = 107
_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
#: So many octets tell the two versions apart.
_START_OCTETS = 6
#: Version 2: signature, version and command, family, length of the rest.
_HEAD = struct.Struct("!12sBBH")
_VERSION = 2
_LOCAL, _PROXY = 0, 1
_IPV4, _IPV6 = 0x11, 0x21
_ADDRESSES = {_IPV4: struct.Struct("!4s4sHH"), _IPV6: struct.Struct("!16s16sHH")}
#: Families that name no TCP client: none, unix sockets, and datagrams. What follows is skipped.
_WITHOUT_ENDS = (0x00, 0x12, 0x22, 0x31, 0x32)
_TLV = struct.Struct("!BH")
_CRC32C_TLV = 0x03
_CRC32C_OCTETS = 4
#: A TLS record of the handshake: what comes first from a client itself.
_TLS_START = b"\x16"


class InvalidProxyHeader(ValueError):
    """Octets that are no PROXY header; the text says why."""


class ProxyHeaderReader:
    """Puts one header together from octets as they come, and never takes one too many.

    ``done`` is whether it is whole. ``ends`` is then what it names, or None where it names nothing
    (LOCAL, UNKNOWN): the connection's own addresses count.
    """

    __slots__ = ("_end", "_octets", "done", "ends")

    def __init__(self) -> None:
        self.done = False
        self.ends: Ends | None = None
        self._octets = bytearray()
        #: Version 2: how many octets to have before the next look.
        self._end = _START_OCTETS

    def feed(self, octets: bytes) -> int:
        """Take the header's part of these octets; returns how many that are.

        Raises InvalidProxyHeader as soon as they cannot become a header.
        """
        taken = 0
        while taken < len(octets) and not self.done:
            if self._octets.startswith(_LINE_START):
                taken += self._feed_line(octets[taken:])
            else:
                taken += self._feed_binary(octets[taken:])
        return taken

    def _feed_line(self, octets: bytes) -> int:
        part = octets[: _MAX_LINE_OCTETS - len(self._octets)]
        part = part[: part.find(b"\n") + 1] or part
        self._octets += part
        if part.endswith(b"\n"):
            self.ends = _read_line(bytes(self._octets))
            self.done = True
        elif len(self._octets) == _MAX_LINE_OCTETS:
            raise InvalidProxyHeader(f"a line of more than {_MAX_LINE_OCTETS} octets")
        return len(part)

    def _feed_binary(self, octets: bytes) -> int:
        part = octets[: self._end - len(self._octets)]
        self._octets += part
        start = bytes(self._octets[: len(_SIGNATURE)])
        if not _SIGNATURE.startswith(start) and not _LINE_START.startswith(start):
            tls = start.startswith(_TLS_START)
            raise InvalidProxyHeader("TLS without a PROXY header" if tls else "no PROXY header")
        if len(self._octets) == self._end:
            self._look()
        return len(part)

    def _look(self) -> None:
        """Go on with a version 2 header of which as much has come as was waited for."""
        if self._end == _START_OCTETS:
            self._end = _HEAD.size
            return
        header = bytes(self._octets)
        _, version, family, length = _HEAD.unpack_from(header)
        if self._end == _HEAD.size:
            _check_head(version, family)
            self._end += length
            if length:
                return
        self.ends = _read_binary(header)
        self.done = True


def _read_line(line: bytes) -> Ends | None:
    if not line.endswith(b"\r\n"):
        raise InvalidProxyHeader("a line that does not end in CR LF")
    kind, *words = line[len(_LINE_START) : -2].split(b" ")
    if kind == b"UNKNOWN":
        return None
    families = {b"TCP4": socket.AF_INET, b"TCP6": socket.AF_INET6}
    if kind not in families or len(words) != 4:
        raise InvalidProxyHeader("a line that is not in the form of version 1")
    client, server, client_port, server_port = words
    return Ends(
        _address(families[kind], client),
        _port(client_port),
        _address(families[kind], server),
        _port(server_port),
    )


def _address(family: socket.AddressFamily, word: bytes) -> str:
    try:
        # In the one form that each address has.
        return socket.inet_ntop(family, socket.inet_pton(family, word.decode("ascii")))
    except (OSError, ValueError):
        raise InvalidProxyHeader("a line with a malformed address") from None


def _port(word: bytes) -> int:
    leading_zero = word.startswith(b"0") and word != b"0"
    if not word.isdigit() or len(word) > 5 or leading_zero or int(word) > 0xFFFF:
        raise InvalidProxyHeader("a line with a malformed port")
    return int(word)


def _check_head(version: int, family: int) -> None:
    if version >> 4 != _VERSION:
        raise InvalidProxyHeader(f"version {version >> 4} of the binary header")
    command = version & 0xF
    if command not in (_LOCAL, _PROXY):
        raise InvalidProxyHeader(f"command {command}")
    # Of LOCAL, everything else is to be ignored.
    if command == _PROXY and family not in _ADDRESSES and family not in _WITHOUT_ENDS:
        raise InvalidProxyHeader(f"address family and protocol 0x{family:02x}")


def _read_binary(header: bytes) -> Ends | None:
    _, version, family, _ = _HEAD.unpack_from(header)
    layout = _ADDRESSES.get(family)
    if version & 0xF == _LOCAL or layout is None:
        return None
    if len(header) < _HEAD.size + layout.size:
        raise InvalidProxyHeader("a length that is too short for the addresses")
    _check_tlvs(header, _HEAD.size + layout.size)
    client, server, client_port, server_port = layout.unpack_from(header, _HEAD.size)
    ip = socket.AF_INET if family == _IPV4 else socket.AF_INET6
    return Ends(
        socket.inet_ntop(ip, client), client_port, socket.inet_ntop(ip, server), server_port
    )


def _check_tlvs(header: bytes, position: int) -> None:
    """Check the checksum, if there is one. Other TLVs are skipped, but have to fit."""
    while position < len(header):
        value = position + _TLV.size
        if value > len(header):
            raise InvalidProxyHeader("a TLV that is cut off")
        kind, length = _TLV.unpack_from(header, position)
        position = value + length
        if position > len(header):
            raise InvalidProxyHeader("a TLV that is cut off")
        if kind == _CRC32C_TLV:
            said = header[value:position]
            without = header[:value] + bytes(length) + header[position:]
            if length != _CRC32C_OCTETS or _crc32c(without) != int.from_bytes(said, "big"):
                raise InvalidProxyHeader("a wrong checksum (CRC32C)")


def _crc32c_table() -> list[int]:
    table = []
    for octet in range(256):
        for _ in range(8):
            octet = octet >> 1 ^ (0x82F63B78 if octet & 1 else 0)
        table.append(octet)
    return table


#: Made once, before the workers are forked.
_CRC32C = _crc32c_table()


def _crc32c(octets: bytes) -> int:
    """Castagnoli's CRC (RFC 9260, appendix A)."""
    crc = 0xFFFF_FFFF
    for octet in octets:
        crc = crc >> 8 ^ _CRC32C[(crc ^ octet) & 0xFF]
    return crc ^ 0xFFFF_FFFF
