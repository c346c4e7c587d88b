"""ClientHello messages, octet by octet (RFC 8446 §4.1.2)."""

import hashlib
from collections.abc import Iterable

__all__ = [
    "RETRY",
    "TLS12",
    "TLS13",
    "certificate_verify",
    "client_hello",
    "flight",
    "message",
    "records",
    "server_hello",
    "vector",
]

TLS12, TLS13 = b"\3\3", b"\3\4"


def vector(length_octets: int, content: bytes) -> bytes:
    return len(content).to_bytes(length_octets, "big") + content


def client_hello(
    server_name: str | None = "localhost",
    versions: Iterable[bytes] = (TLS13, TLS12),
    random: bytes = bytes(range(32)),
    more: Iterable[tuple[int, bytes]] = (),
) -> bytes:
    """The message with its header; with ``more`` extensions in front, by their numbers.

    Without ``versions``, it has no such extension.
    """
    extensions = list(more)
    if server_name is not None:
        name = b"\0" + vector(2, server_name.encode())
        extensions.append((0, vector(2, name)))
    if offered := b"".join(versions):
        extensions.append((43, vector(1, offered)))
    encoded = b"".join(kind.to_bytes(2, "big") + vector(2, data) for kind, data in extensions)
    fields = TLS12 + random + vector(1, b"") + vector(2, b"\x13\x01\xc0\x2b") + vector(1, b"\0")
    return b"\1" + vector(3, fields + vector(2, encoded))


def records(message: bytes, size: int = 16384) -> bytes:
    """The message in records of so many octets (§5.1)."""
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16\3\1" + vector(2, piece) for piece in pieces)


RETRY = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")


def message(kind: int, body: bytes) -> bytes:
    """A handshake message (§4)."""
    return bytes((kind,)) + vector(3, body)


def server_hello(suite: int = 0x1301, random: bytes = bytes(32)) -> bytes:
    return message(2, TLS12 + random + vector(1, bytes(32)) + suite.to_bytes(2, "big") + b"\0")


def flight(suite: int = 0x1301, *more: bytes, certificate: bytes = b"whatever") -> bytes:
    """A server's messages up to its Certificate, with ``more`` in front."""
    rest = server_hello(suite), message(8, b"\0\0"), message(11, certificate)
    return b"".join((*more, *rest))


def certificate_verify(hello: bytes, messages: bytes, algorithm: str = "sha256") -> bytes:
    """What is signed after these (§4.4.3); without a HelloRetryRequest among them."""
    digest = hashlib.new(algorithm, hello + messages).digest()
    return b" " * 64 + b"TLS 1.3, server CertificateVerify\0" + digest
