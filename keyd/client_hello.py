"""The first message of a client, as the parent has seen it: what keyd holds a request against.

Run by keyd, once for each request, on octets that a client chose: hostile. Octets in, value out.
Read are the random, the server's name, and whether TLS 1.3 is offered; of the rest, only lengths.
Whatever the worker and OpenSSL take is taken here, up to ``MAX_EXTENSIONS``.

RFC 8446 §4.1.2 (ClientHello) and §4.2.1 (supported_versions), RFC 6066 §3 (server_name).
"""

from typing import NamedTuple

__all__ = ["MAX_EXTENSIONS", "ClientHello", "InvalidClientHello", "TooManyExtensions", "read"]

#: A browser sends about twenty. Each takes time.
MAX_EXTENSIONS = 256

_HEADER_OCTETS = 4
_CLIENT_HELLO = 1
_RANDOM_AT, _RANDOM_OCTETS = _HEADER_OCTETS + 2, 32
_SERVER_NAME = 0
_HOST_NAME = 0
_MAX_NAME_OCTETS = 255
_SUPPORTED_VERSIONS = 43
_TLS13 = b"\3\4"


class InvalidClientHello(ValueError):
    """Octets that a handshake cannot begin with."""


class TooManyExtensions(InvalidClientHello):
    """They may be well-formed."""


class ClientHello(NamedTuple):
    """What was read. The name is as the client sent it, or None if it sent none."""

    random: bytes
    server_name: str | None
    offers_tls13: bool


def read(message: bytes) -> ClientHello:
    """Read a message with its header; raises InvalidClientHello."""
    if message[:1] != bytes((_CLIENT_HELLO,)):
        raise InvalidClientHello("no ClientHello")
    if int.from_bytes(message[1:_HEADER_OCTETS], "big") != len(message) - _HEADER_OCTETS:
        raise InvalidClientHello(f"a ClientHello of {len(message)} octets, and of another length")
    at = _RANDOM_AT + _RANDOM_OCTETS
    for length_octets in (1, 2, 1):  # legacy_session_id, cipher_suites, compression methods
        _, at = _vector(message, at, length_octets)
    name, versions = _extensions(message, at) if at < len(message) else (None, None)
    return ClientHello(
        message[_RANDOM_AT : _RANDOM_AT + _RANDOM_OCTETS],
        None if name is None else _host_name(name),
        versions is not None and _TLS13 in _versions(versions),
    )


def _vector(octets: bytes, at: int, length_octets: int) -> tuple[bytes, int]:
    """A field with its length in front, and where the next one begins."""
    start = at + length_octets
    end = start + int.from_bytes(octets[at:start], "big")
    if start > len(octets) or end > len(octets):
        raise InvalidClientHello("a ClientHello with a field that runs past its end")
    return octets[start:end], end


def _extensions(message: bytes, at: int) -> tuple[bytes | None, bytes | None]:
    """The first server_name and the first supported_versions."""
    name = versions = None
    extensions, _ = _vector(message, at, 2)
    at = 0
    for _ in range(MAX_EXTENSIONS):
        if at == len(extensions):
            return name, versions
        kind = int.from_bytes(extensions[at : at + 2], "big")
        data, at = _vector(extensions, at + 2, 2)
        if kind == _SERVER_NAME and name is None:
            name = data
        elif kind == _SUPPORTED_VERSIONS and versions is None:
            versions = data
    if at < len(extensions):
        raise TooManyExtensions(f"a ClientHello with more than {MAX_EXTENSIONS} extensions")
    return name, versions


def _host_name(data: bytes) -> str:
    names, _ = _vector(data, 0, 2)
    if names[:1] != bytes((_HOST_NAME,)):
        raise InvalidClientHello("a ClientHello with a server_name that is not a host name")
    name, _ = _vector(names, 1, 2)
    if not 0 < len(name) <= _MAX_NAME_OCTETS or not name.isascii():
        raise InvalidClientHello("a ClientHello with a server_name that is no name")
    text = name.decode("ascii")
    if not text.isprintable():
        raise InvalidClientHello("a ClientHello with a server_name that is no name")
    return text


def _versions(data: bytes) -> list[bytes]:
    versions, end = _vector(data, 0, 1)
    if len(versions) % 2 or end != len(data):
        raise InvalidClientHello("a ClientHello with a malformed list of versions")
    return [versions[at : at + 2] for at in range(0, len(versions), 2)]
