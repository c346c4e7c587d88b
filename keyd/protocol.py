"""keyd's messages: octets in, values out, and back.

Used by keyd, by the parent that opens channels, by the tests and the fuzzer;
the provider (C) speaks the same format. Nothing here does I/O, and nothing here
decides: what keyd grants is in ``powers``.

Every message travels whole in one SOCK_SEQPACKET packet, integers in network
byte order:

=========  =======================================================================
request    version(1) operation(1) parameter(2) key(32) payload(1..1024)
reply      version(1) status(1) payload(0..1024)
open       version(1) 'O'(1) connection(8) lifetime_ms(4) operations(2)
           grants(n x (operations_mask(1) key(32))), the channel by SCM_RIGHTS
refusal    version(1) 'R'(1) connection(8) status(1) detail(0..200, UTF-8)
keys       version(1) 'K'(1) n x key(32): first message to each client of ``keyd control``
=========  =======================================================================

``key`` is the SHA-256 of the key's SubjectPublicKeyInfo (RFC 5280 §4.1). The
``parameter`` is the SignatureScheme (RFC 8446 §4.2.3) of a *sign*, and the
ClientHello's legacy_version of a *decrypt* (RFC 5246 §7.4.7.1).
"""

import enum
import operator
import struct
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import NamedTuple

__all__ = [
    "KEY_ID_OCTETS",
    "MAX_KEYS_OCTETS",
    "MAX_OPEN_OCTETS",
    "MAX_PAYLOAD_OCTETS",
    "MAX_REFUSAL_OCTETS",
    "MAX_REPLY_OCTETS",
    "MAX_REQUEST_OCTETS",
    "PREMASTER_SECRET_OCTETS",
    "Keys",
    "Malformed",
    "Open",
    "Operation",
    "Refusal",
    "Reply",
    "Request",
    "SignatureScheme",
    "Status",
    "fingerprint",
]

VERSION = 1
KEY_ID_OCTETS = 32
#: The longest payload is an RSA-8192 ciphertext or signature.
MAX_PAYLOAD_OCTETS = 1024
PREMASTER_SECRET_OCTETS = 48

_REQUEST = struct.Struct("!BBH32s")
_REPLY = struct.Struct("!BB")
_OPEN = struct.Struct("!BcQIH")
_REFUSAL = struct.Struct("!BcQB")
_GRANT = struct.Struct("!B32s")

MAX_REQUEST_OCTETS = _REQUEST.size + MAX_PAYLOAD_OCTETS
MAX_REPLY_OCTETS = _REPLY.size + MAX_PAYLOAD_OCTETS
MAX_REFUSAL_OCTETS = _REFUSAL.size + 200
#: Enough for some 2,000 keys.
MAX_KEYS_OCTETS = 64 * 1024
#: Enough for some 1,900 distinct keys behind one listening address.
MAX_OPEN_OCTETS = 64 * 1024


class Malformed(ValueError):
    """A message that violates the protocol."""


class Operation(enum.IntEnum):
    """What a channel may ask for."""

    SIGN = 1
    DECRYPT = 2


class Status(enum.IntEnum):
    """How keyd answered. After any status but DONE, keyd closes the channel."""

    DONE = 0
    MALFORMED = 1
    NOT_GRANTED = 2
    UNKNOWN_KEY = 3
    NOT_TLS = 4
    EXHAUSTED = 5
    EXPIRED = 6
    FAILED = 7


class SignatureScheme(enum.IntEnum):
    """The schemes of RFC 8446 §4.2.3 that keyd signs with: SHA-1 is left out."""

    rsa_pkcs1_sha256 = 0x0401
    rsa_pkcs1_sha384 = 0x0501
    rsa_pkcs1_sha512 = 0x0601
    ecdsa_secp256r1_sha256 = 0x0403
    ecdsa_secp384r1_sha384 = 0x0503
    ecdsa_secp521r1_sha512 = 0x0603
    rsa_pss_rsae_sha256 = 0x0804
    rsa_pss_rsae_sha384 = 0x0805
    rsa_pss_rsae_sha512 = 0x0806
    ed25519 = 0x0807
    rsa_pss_pss_sha256 = 0x0809
    rsa_pss_pss_sha384 = 0x080A
    rsa_pss_pss_sha512 = 0x080B


class Request(NamedTuple):
    """What a worker, through the provider, asks of keyd."""

    operation: Operation
    parameter: int
    key: bytes
    payload: bytes

    def encode(self) -> bytes:
        head = _REQUEST.pack(VERSION, self.operation, self.parameter, self.key)
        return head + self.payload

    @classmethod
    def decode(cls, message: bytes) -> "Request":
        """Raise Malformed, saying what is wrong with the message."""
        if not _REQUEST.size < len(message) <= MAX_REQUEST_OCTETS:
            raise Malformed(f"a request of {len(message)} octets")
        version, operation, parameter, key = _REQUEST.unpack_from(message)
        if version != VERSION:
            raise Malformed(f"a request of version {version}")
        try:
            return cls(Operation(operation), parameter, key, message[_REQUEST.size :])
        except ValueError:
            raise Malformed(f"a request for operation {operation}") from None


class Reply(NamedTuple):
    """keyd's answer: a signature, a premaster secret, or why not."""

    status: Status
    payload: bytes = b""

    def encode(self) -> bytes:
        return _REPLY.pack(VERSION, self.status) + self.payload

    @classmethod
    def decode(cls, message: bytes) -> "Reply":
        """Raise Malformed, saying what is wrong with the message."""
        if not _REPLY.size <= len(message) <= MAX_REPLY_OCTETS:
            raise Malformed(f"a reply of {len(message)} octets")
        version, status = _REPLY.unpack_from(message)
        if version != VERSION:
            raise Malformed(f"a reply of version {version}")
        try:
            return cls(Status(status), message[_REPLY.size :])
        except ValueError:
            raise Malformed(f"a reply of status {status}") from None


class Open(NamedTuple):
    """The parent's terms for one new channel.

    ``connection`` names the connection in keyd's records, ``lifetime_ms`` is how
    long from now the channel may be used, ``operations`` how often, and
    ``grants`` what it may do with which key.
    """

    connection: int
    lifetime_ms: int
    operations: int
    grants: Mapping[bytes, frozenset[Operation]]

    def encode(self) -> bytes:
        """Raise Malformed where the grants do not fit into one message."""
        head = _OPEN.pack(VERSION, b"O", self.connection, self.lifetime_ms, self.operations)
        message = head + b"".join(
            _GRANT.pack(_mask(operations), key) for key, operations in self.grants.items()
        )
        if len(message) > MAX_OPEN_OCTETS:
            raise Malformed(f"{len(self.grants)} keys for one channel")
        return message

    @classmethod
    def decode(cls, message: bytes) -> "Open":
        """Raise Malformed, saying what is wrong with the message."""
        if not _OPEN.size < len(message) <= MAX_OPEN_OCTETS:
            raise Malformed(f"an open of {len(message)} octets")
        version, kind, connection, lifetime_ms, operations = _OPEN.unpack_from(message)
        if (version, kind) != (VERSION, b"O"):
            raise Malformed(f"a control message of version {version}, kind {kind!r}")
        grants = message[_OPEN.size :]
        if len(grants) % _GRANT.size:
            raise Malformed(f"grants of {len(grants)} octets")
        return cls(
            connection,
            lifetime_ms,
            operations,
            {key: _operations(mask) for mask, key in _GRANT.iter_unpack(grants)},
        )


class Refusal(NamedTuple):
    """From keyd to the parent, for the record: what keyd refused to which connection."""

    connection: int
    status: Status
    detail: str

    def encode(self) -> bytes:
        head = _REFUSAL.pack(VERSION, b"R", self.connection, self.status)
        return (head + self.detail.encode())[:MAX_REFUSAL_OCTETS]

    @classmethod
    def decode(cls, message: bytes) -> "Refusal":
        """Raise Malformed, saying what is wrong with the message."""
        if not _REFUSAL.size <= len(message) <= MAX_REFUSAL_OCTETS:
            raise Malformed(f"a refusal of {len(message)} octets")
        version, kind, connection, status = _REFUSAL.unpack_from(message)
        if (version, kind) != (VERSION, b"R"):
            raise Malformed(f"a control message of version {version}, kind {kind!r}")
        try:
            known = Status(status)
        except ValueError:
            raise Malformed(f"a refusal of status {status}") from None
        return cls(connection, known, message[_REFUSAL.size :].decode(errors="replace"))


class Keys(NamedTuple):
    """From keyd to a supervisor that did not start it: the keys that keyd has."""

    keys: tuple[bytes, ...]

    def encode(self) -> bytes:
        """Raise Malformed where the keys do not fit into one message."""
        message = bytes((VERSION,)) + b"K" + b"".join(self.keys)
        if len(message) > MAX_KEYS_OCTETS:
            raise Malformed(f"{len(self.keys)} keys in one keyd")
        return message

    @classmethod
    def decode(cls, message: bytes) -> "Keys":
        """Raise Malformed, saying what is wrong with the message."""
        keys = message[2:]
        if message[:2] != bytes((VERSION,)) + b"K" or len(keys) % KEY_ID_OCTETS:
            raise Malformed(f"{len(message)} octets that do not list keys")
        return cls(
            tuple(
                keys[start : start + KEY_ID_OCTETS] for start in range(0, len(keys), KEY_ID_OCTETS)
            )
        )


def fingerprint(keys: Iterable[bytes]) -> str:
    """The keys' ids, XORed, in hexadecimal: short for any number of keys, in any order."""
    ids = (int.from_bytes(key, "big") for key in keys)
    return reduce(operator.xor, ids, 0).to_bytes(KEY_ID_OCTETS, "big").hex()


def _mask(operations: frozenset[Operation]) -> int:
    return sum(1 << operation for operation in operations)


def _operations(mask: int) -> frozenset[Operation]:
    operations = frozenset(operation for operation in Operation if mask >> operation & 1)
    if not operations or _mask(operations) != mask:
        raise Malformed(f"a grant of operations 0x{mask:02x}")
    return operations
