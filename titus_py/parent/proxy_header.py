"""The PROXY protocol's header, as a backend gets it: addresses in, octets out; no I/O.

Imported by the parent where a virtual host sends one. The addresses are those that the parent
knows. The TLS facts, and what a client's certificate says, are a worker's words, and no better than
that worker.

The format: haproxy's proxy-protocol.txt, section 2.
"""

import socket
import struct
from typing import TYPE_CHECKING

from titus_py.between.messages import Ends, TlsFacts

if TYPE_CHECKING:
    from titus_py.between.client_identity import Identity

__all__ = ["CannotEncode", "version_1", "version_2", "without_client"]

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
#: Version 2, and the command: the connection is on behalf of another, or the sender's own.
_PROXY, _LOCAL = 0x21, 0x20
#: The address families, each with a stream; and no addresses.
_TCP4, _TCP6, _UNSPECIFIED = 0x11, 0x21, 0x00
_UNKNOWN = b"PROXY UNKNOWN\r\n"
_HEAD = struct.Struct("!12sBBH")
_PORTS = struct.Struct("!HH")
_TLV = struct.Struct("!BH")
_MAX_LENGTH = 0xFFFF

_ALPN, _AUTHORITY, _SSL = 0x01, 0x02, 0x20
#: PP2_TYPE_MIN_CUSTOM, for applications: the name of a [[vhost.client]].
_CLIENT_NAME = 0xE0
#: Within the TLV of SSL.
_SSL_VERSION, _SSL_CN, _SSL_CIPHER, _SSL_CLIENT_CERTIFICATE = 0x21, 0x22, 0x23, 0x28
_SSL_HEAD = struct.Struct("!BI")
#: The client came over TLS; it has shown a certificate, on this connection and in this session.
_CLIENT_SSL, _CLIENT_CERTIFICATE = 0x01, 0x02 | 0x04
#: "Verify" of a certificate that was accepted; and, where none was shown, anything else.
_VERIFIED, _NOT_VERIFIED = 0, 1

_MAPPED = b"\0" * 10 + b"\xff\xff"


class CannotEncode(ValueError):
    """What does not fit into a header."""


def version_1(ends: Ends) -> bytes:
    """The line of version 1: at most 107 octets. Raises CannotEncode."""
    if _on_unix(ends):
        return _UNKNOWN
    family, client, server = _packed(ends)
    name = "TCP4" if family == socket.AF_INET else "TCP6"
    addresses = (socket.inet_ntop(family, octets) for octets in (client, server))
    return f"PROXY {name} {' '.join(addresses)} {ends.client_port} {ends.server_port}\r\n".encode()


def version_2(
    ends: Ends,
    facts: TlsFacts | None = None,
    protocol: str | None = None,
    identity: "Identity | None" = None,
    client_name: str | None = None,
) -> bytes:
    """The header of version 2, with TLVs for these facts. Raises CannotEncode.

    ``identity`` is what the client's certificate says; it is left out without ``facts``.
    ``client_name`` is what its virtual host calls it.
    """
    kind, body = _UNSPECIFIED, b""
    if not _on_unix(ends):
        family, client, server = _packed(ends)
        kind = _TCP4 if family == socket.AF_INET else _TCP6
        body = client + server + _PORTS.pack(ends.client_port, ends.server_port)
    if protocol is not None:
        body += _tlv(_ALPN, protocol.encode())
    if facts is not None:
        if facts.server_name:
            body += _tlv(_AUTHORITY, facts.server_name.encode())
        body += _tlv(_SSL, _about_tls(facts, identity))
    if client_name is not None:
        body += _tlv(_CLIENT_NAME, client_name.encode())
    _check_length("a header", body)
    return _HEAD.pack(_SIGNATURE, _PROXY, kind, len(body)) + body


def without_client(how: str) -> bytes:
    """The header of a connection that is for no client, such as a health check."""
    return _UNKNOWN if how == "v1" else _HEAD.pack(_SIGNATURE, _LOCAL, 0, 0)


def _about_tls(facts: TlsFacts, identity: "Identity | None") -> bytes:
    about = _tlv(_SSL_VERSION, facts.version.encode())
    about += _tlv(_SSL_CIPHER, facts.cipher_suite.encode())
    if identity is None:
        return _SSL_HEAD.pack(_CLIENT_SSL, _NOT_VERIFIED) + about
    if not identity.certificate:
        raise CannotEncode("the client's certificate is too long")
    # Its worker has refused one with too many names. Nothing here is of the other links, which may
    # be incomplete: with a serial number of more than 20 octets, for one.
    # Of several common names, the first one. There may be none.
    for name in identity.facts.cn[:1]:
        about += _tlv(_SSL_CN, name.encode())
    about += _tlv(_SSL_CLIENT_CERTIFICATE, identity.certificate)
    return _SSL_HEAD.pack(_CLIENT_SSL | _CLIENT_CERTIFICATE, _VERIFIED) + about


def _tlv(kind: int, value: bytes) -> bytes:
    _check_length("a field", value)
    return _TLV.pack(kind, len(value)) + value


def _check_length(what: str, octets: bytes) -> None:
    """Raises CannotEncode for more than a length in the header can say."""
    if len(octets) > _MAX_LENGTH:
        raise CannotEncode(f"{what} of {len(octets)} octets, of which {_MAX_LENGTH} are possible")


def _on_unix(ends: Ends) -> bool:
    """Whether the client is on a unix socket: it has no address, and is on this machine."""
    return ends.client.startswith("unix:")


def _packed(ends: Ends) -> tuple[socket.AddressFamily, bytes, bytes]:
    """The family that both addresses have, and both: IPv6 if only one of them is an IPv4 address.

    IPv4-mapped addresses (RFC 4291 §2.5.5.2) count as IPv4. The interface of a link-local address
    is left out: it means nothing elsewhere.
    """
    both = []
    for address in (ends.client, ends.server):
        number = address.partition("%")[0]
        family = socket.AF_INET6 if ":" in number else socket.AF_INET
        try:
            octets = socket.inet_pton(family, number)
        except OSError:
            raise CannotEncode(f"{address!r} is no IP address") from None
        both.append(octets.removeprefix(_MAPPED) if len(octets) == 16 else octets)
    if all(len(octets) == 4 for octets in both):
        return socket.AF_INET, both[0], both[1]
    client, server = (_MAPPED + octets if len(octets) == 4 else octets for octets in both)
    return socket.AF_INET6, client, server
