"""keyd's messages: octets in, values out, and back.

Used by keyd, by the parent that opens channels, by the tests and the fuzzer;
the provider (C) speaks the same format. Nothing here does I/O, and nothing here
decides: what keyd grants is in ``powers``.

Every message travels whole in one SOCK_SEQPACKET packet, integers in network
byte order:

=========  =======================================================================
request    version(1) operation(1) parameter(2) key(32) payload(1..1024)
           version(1) 3(1) parameter(2) key(32) length(2) payload(1..1024)
           messages(0..196608): to sign in TLS 1.3
reply      version(1) status(1) payload(0..4627)
grants     version(1) 'G'(1) set(4) n x (site(4) powers_mask(1) key(32) length(1)
           name(0..255, ASCII)): adds to a set
open       version(1) 'O'(1) connection(8) lifetime_ms(4) operations(2) set(4)
           client_hello(0..131400), the channel by SCM_RIGHTS
refusal    version(1) 'R'(1) connection(8) status(1) detail(0..200, UTF-8)
done       version(1) 'D'(1) connection(8) operation(1)
parting    version(1) 'P'(1): the last report, of a keyd that goes on
keys       version(1) 'K'(1) n x the first 8 octets of a key: the first message to each
           client of ``keyd control``
=========  =======================================================================

``key`` is the SHA-256 of the key's SubjectPublicKeyInfo (RFC 5280 §4.1). A parent
announces a set of grants once, in as many messages as it takes, and then names it by
number: a channel costs the same for one key and for thousands. The set says which
keys are for which server names. ``client_hello`` is what the parent has seen of the
client itself, before any worker had the connection: its name selects the keys. The
``messages`` are those that follow it up to the server's Certificate, as they were sent;
none, if they were too long. The
``parameter`` is the SignatureScheme (RFC 8446 §4.2.3) of a *sign*, and the
ClientHello's legacy_version of a *decrypt* (RFC 5246 §7.4.7.1).
"""

import enum
import operator
import struct
from collections.abc import Iterable, Mapping
from functools import cache, reduce
from typing import NamedTuple

__all__ = [
    "ANY_NAME",
    "KEY_ID_OCTETS",
    "KEY_IN_REQUEST",
    "MAX_CLIENT_HELLO_OCTETS",
    "MAX_CONTROL_OCTETS",
    "MAX_HANDED",
    "MAX_KEYS",
    "MAX_KEYS_OCTETS",
    "MAX_PAYLOAD_OCTETS",
    "MAX_REFUSAL_OCTETS",
    "MAX_REPLY_OCTETS",
    "MAX_REPLY_PAYLOAD_OCTETS",
    "MAX_REQUEST_IN_HANDSHAKE_OCTETS",
    "MAX_REQUEST_OCTETS",
    "PREMASTER_SECRET_OCTETS",
    "SHORT_ID_OCTETS",
    "Done",
    "Grant",
    "GrantSet",
    "Grants",
    "Keys",
    "Malformed",
    "Open",
    "Operation",
    "Parting",
    "Power",
    "Refusal",
    "Reply",
    "Request",
    "SignatureScheme",
    "Status",
    "decode_control",
    "decode_report",
    "fingerprint",
    "mask_of",
    "powers_of",
]

VERSION = 1
#: Of the messages between keyd and its parents.
CONTROL_VERSION = 5
KEY_ID_OCTETS = 32
#: How much of a key's id is enough to tell it from others, where nothing depends on it.
SHORT_ID_OCTETS = 8
#: The longest payload of a request is an RSA-8192 ciphertext, of a reply an ML-DSA-87 signature.
MAX_PAYLOAD_OCTETS = 1024
MAX_REPLY_PAYLOAD_OCTETS = 4627
PREMASTER_SECRET_OCTETS = 48

_REQUEST = struct.Struct("!BBH32s")
#: Where a request has the key's id.
KEY_IN_REQUEST = slice(4, 4 + KEY_ID_OCTETS)
_REPLY = struct.Struct("!BB")
_OPEN = struct.Struct("!BcQIHI")
_GRANT_SET = struct.Struct("!BcI")
_REFUSAL = struct.Struct("!BcQB")
_DONE = struct.Struct("!BcQB")
#: Of a grant, without the name.
_GRANT = struct.Struct("!IB32sB")

MAX_REQUEST_OCTETS = _REQUEST.size + MAX_PAYLOAD_OCTETS
#: As an operation on the wire.
_SIGN_IN_HANDSHAKE = 3
_PAYLOAD_LENGTH = struct.Struct("!H")
_MAX_MESSAGES_OCTETS = 192 * 1024
MAX_REQUEST_IN_HANDSHAKE_OCTETS = MAX_REQUEST_OCTETS + _PAYLOAD_LENGTH.size + _MAX_MESSAGES_OCTETS
MAX_REPLY_OCTETS = _REPLY.size + MAX_REPLY_PAYLOAD_OCTETS
MAX_REFUSAL_OCTETS = _REFUSAL.size + 200
#: How many keys one keyd may have: their list fits into one message, whose room is by default 208
#: KiB (net.core.wmem_default).
MAX_KEYS = 20_000
MAX_KEYS_OCTETS = 2 + MAX_KEYS * SHORT_ID_OCTETS
#: How many keys a keyd hands to its successor (``keyd.succession``): they fit into the buffer of a
#: socket, whose reader may not have started yet.
MAX_HANDED = 16
#: How many octets of grants one message has before the last one: so a message fits into a socket's
#: buffer, however small that is (4.5 KiB; net.core.wmem_default).
_MOST_GRANTS_OCTETS = 4000
#: The longest ClientHello that there can be, with the header of the message: 2 octets of version,
#: 32 of random, and four vectors at their longest. This is also OpenSSL's limit.
MAX_CLIENT_HELLO_OCTETS = 4 + 2 + 32 + (1 + 32) + (2 + 65534) + (1 + 255) + (2 + 65535)
#: In a grant: any name, and none.
ANY_NAME = "*"
#: A parent numbers its connections by the microseconds since boot. The supervisor takes no event
#: of a parent that has a larger number in it.
_MOST_CONNECTIONS = (1 << 63) - 1
#: The longest message of a parent.
MAX_CONTROL_OCTETS = _OPEN.size + MAX_CLIENT_HELLO_OCTETS


class Malformed(ValueError):
    """A message that violates the protocol."""


class Operation(enum.IntEnum):
    """What a request asks for."""

    SIGN = 1
    DECRYPT = 2


#: By number. To ask the enumeration takes three times as long.
_OPERATIONS = {int(operation): operation for operation in Operation}


class Power(enum.IntEnum):
    """What a channel may have done with a key.

    Signatures are told apart by what is signed: a virtual host that speaks TLS 1.3 alone needs no
    signature of TLS 1.2. One that speaks both needs them only with the mark by which a client that
    speaks both sees a downgrade. With X448, almost all of those octets are the worker's choice: it
    takes a power besides.
    """

    SIGN_TLS12 = 1
    SIGN_TLS12_X448 = 2
    SIGN_TLS13 = 3
    DECRYPT = 4
    SIGN_TLS12_MARKED = 5
    #: As a client, and nothing else: a key is a server's or a client's.
    SIGN_TLS13_CLIENT = 6


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
    UNWITNESSED = 8


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
    # draft-ietf-tls-mldsa: in TLS 1.3 alone.
    mldsa44 = 0x0904
    mldsa65 = 0x0905
    mldsa87 = 0x0906


class Request(NamedTuple):
    """What a worker, through the provider, asks of keyd.

    ``messages`` are those of the handshake that something is to be signed for, after the
    ClientHello, each with its header (RFC 8446 §4); empty if they are too long, None where they are
    not needed.
    """

    operation: Operation
    parameter: int
    key: bytes
    payload: bytes
    messages: bytes | None = None

    def encode(self) -> bytes:
        if self.messages is None:
            head = _REQUEST.pack(VERSION, self.operation, self.parameter, self.key)
            return head + self.payload
        head = _REQUEST.pack(VERSION, _SIGN_IN_HANDSHAKE, self.parameter, self.key)
        return head + _PAYLOAD_LENGTH.pack(len(self.payload)) + self.payload + self.messages

    @classmethod
    def decode(cls, message: bytes) -> "Request":
        """Raise Malformed, saying what is wrong with the message."""
        if len(message) <= _REQUEST.size:
            raise Malformed(f"a request of {len(message)} octets")
        version, operation, parameter, key = _REQUEST.unpack_from(message)
        if version != VERSION:
            raise Malformed(f"a request of version {version}")
        payload, messages = message[_REQUEST.size :], None
        if operation == _SIGN_IN_HANDSHAKE:
            operation = Operation.SIGN
            (length,) = _PAYLOAD_LENGTH.unpack(payload[: _PAYLOAD_LENGTH.size].ljust(2, b"\0"))
            end = _PAYLOAD_LENGTH.size + length
            payload, messages = payload[_PAYLOAD_LENGTH.size : end], payload[end:]
            if len(payload) != length or len(messages) > _MAX_MESSAGES_OCTETS:
                raise Malformed(f"a request of {len(message)} octets")
        if not 0 < len(payload) <= MAX_PAYLOAD_OCTETS:
            raise Malformed(f"a request of {len(message)} octets")
        known = _OPERATIONS.get(operation)
        if known is None:
            raise Malformed(f"a request for operation {operation}")
        return cls(known, parameter, key, payload, messages)


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


#: What a channel may do with which key.
Grants = Mapping[bytes, frozenset[Power]]


class Grant(NamedTuple):
    """What may be done with a key for clients that ask for a name.

    ``site`` numbers the virtual host. Of those that a name fits, the one with the lowest number has
    it. ``name`` is in lower case, with ``*.`` in front for exactly one label; it is empty for
    clients that send none, or ``ANY_NAME``.
    """

    site: int
    name: str
    key: bytes
    powers: frozenset[Power]

    def encode(self) -> bytes:
        name = self.name.encode("ascii")
        return _GRANT.pack(self.site, mask_of(self.powers), self.key, len(name)) + name


class GrantSet(NamedTuple):
    """Grants that channels are opened with, and the number by which ``Open`` names them.

    A set that is too large for one message comes in several, one after the other.
    """

    number: int
    grants: tuple[Grant, ...]

    def encode(self) -> list[bytes]:
        head = _GRANT_SET.pack(CONTROL_VERSION, b"G", self.number)
        # A set without any grants is announced, too.
        messages = [bytearray(head)]
        for grant in self.grants:
            if len(messages[-1]) >= _MOST_GRANTS_OCTETS:
                messages.append(bytearray(head))
            messages[-1] += grant.encode()
        return [bytes(message) for message in messages]

    @classmethod
    def decode(cls, message: bytes) -> "GrantSet":
        """Raise Malformed, saying what is wrong with the message."""
        if not _GRANT_SET.size <= len(message) <= MAX_CONTROL_OCTETS:
            raise Malformed(f"grants of {len(message)} octets")
        version, kind, number = _GRANT_SET.unpack_from(message)
        _expect(version, kind, b"G")
        grants, at = [], _GRANT_SET.size
        while at < len(message):
            if len(message) - at < _GRANT.size:
                raise Malformed(f"grants of {len(message)} octets")
            site, mask, key, length = _GRANT.unpack_from(message, at)
            at += _GRANT.size + length
            name = message[at - length : at]
            if len(name) != length or not name.isascii():
                raise Malformed(f"a grant for the name {name!r}")
            grants.append(Grant(site, name.decode(), key, powers_of(mask)))
        return cls(number, tuple(grants))


class Open(NamedTuple):
    """The parent's terms for one new channel.

    ``connection`` names the connection in keyd's records, ``lifetime_ms`` is how
    long from now the channel may be used, ``operations`` how often, and
    ``grants`` the number of the set that says what it may do with which key.
    ``client_hello`` is the client's message with its header (RFC 8446 §4), as the parent
    has seen it; empty if it has not seen one. Then nothing is done for this channel.
    """

    connection: int
    lifetime_ms: int
    operations: int
    grants: int
    client_hello: bytes = b""

    def encode(self) -> bytes:
        *terms, client_hello = self
        return _OPEN.pack(CONTROL_VERSION, b"O", *terms) + client_hello

    @classmethod
    def decode(cls, message: bytes) -> "Open":
        """Raise Malformed, saying what is wrong with the message."""
        if not _OPEN.size <= len(message) <= MAX_CONTROL_OCTETS:
            raise Malformed(f"an open of {len(message)} octets")
        version, kind, connection, lifetime_ms, operations, grants = _OPEN.unpack_from(message)
        _expect(version, kind, b"O")
        return cls(connection, lifetime_ms, operations, grants, message[_OPEN.size :])


def decode_control(message: bytes) -> GrantSet | Open:
    """A message of a parent's. Raise Malformed, saying what is wrong with it."""
    return GrantSet.decode(message) if message[1:2] == b"G" else Open.decode(message)


class Refusal(NamedTuple):
    """From keyd to the parent, for the record: what keyd refused to which connection."""

    connection: int
    status: Status
    detail: str

    def encode(self) -> bytes:
        head = _REFUSAL.pack(CONTROL_VERSION, b"R", self.connection, self.status)
        return (head + self.detail.encode())[:MAX_REFUSAL_OCTETS]

    @classmethod
    def decode(cls, message: bytes) -> "Refusal":
        """Raise Malformed, saying what is wrong with the message."""
        if not _REFUSAL.size <= len(message) <= MAX_REFUSAL_OCTETS:
            raise Malformed(f"a refusal of {len(message)} octets")
        version, kind, connection, status = _REFUSAL.unpack_from(message)
        _expect(version, kind, b"R")
        if connection > _MOST_CONNECTIONS:
            raise Malformed(f"a refusal to connection {connection}")
        try:
            known = Status(status)
        except ValueError:
            raise Malformed(f"a refusal of status {status}") from None
        return cls(connection, known, message[_REFUSAL.size :].decode(errors="replace"))


class Done(NamedTuple):
    """From keyd to the parent: an operation that was done for a connection.

    It is for counting. It is lost if the parent does not keep up.
    """

    connection: int
    operation: Operation

    def encode(self) -> bytes:
        return _DONE.pack(CONTROL_VERSION, b"D", *self)

    @classmethod
    def decode(cls, message: bytes) -> "Done":
        """Raise Malformed, saying what is wrong with the message."""
        if len(message) != _DONE.size:
            raise Malformed(f"an operation done of {len(message)} octets")
        version, kind, connection, operation = _DONE.unpack(message)
        _expect(version, kind, b"D")
        try:
            return cls(connection, Operation(operation))
        except ValueError:
            raise Malformed(f"operation {operation} done") from None


class Parting(NamedTuple):
    """From keyd to the parent, before it shuts its side down or closes it.

    It still serves the channels that it has, and can report nothing of that.
    """

    def encode(self) -> bytes:
        return bytes((CONTROL_VERSION,)) + b"P"


def decode_report(message: bytes) -> Refusal | Done | Parting:
    """A message of keyd's to a parent. Raise Malformed, saying what is wrong with it."""
    if message[1:2] == b"D":
        return Done.decode(message)
    return Parting() if message == Parting().encode() else Refusal.decode(message)


class Keys(NamedTuple):
    """From keyd to a supervisor that did not start it: the keys that keyd has, by short ids.

    The supervisor compares them with the keys that it needs, to say which are missing.
    """

    keys: tuple[bytes, ...]

    @classmethod
    def of(cls, keys: Iterable[bytes]) -> "Keys":
        """From whole ids. Another thread may take a key in, or let go of one, meanwhile."""
        return cls(tuple(key[:SHORT_ID_OCTETS] for key in tuple(keys)))

    def encode(self) -> bytes:
        """Raise Malformed where the keys do not fit into one message."""
        if len(self.keys) > MAX_KEYS:
            raise Malformed(f"{len(self.keys)} keys in one keyd, and {MAX_KEYS} at most")
        return bytes((CONTROL_VERSION,)) + b"K" + b"".join(self.keys)

    @classmethod
    def decode(cls, message: bytes) -> "Keys":
        """Raise Malformed, saying what is wrong with the message."""
        keys = message[2:]
        if message[:2] != bytes((CONTROL_VERSION,)) + b"K" or len(keys) % SHORT_ID_OCTETS:
            raise Malformed(f"{len(message)} octets that do not list keys")
        return cls(
            tuple(
                keys[start : start + SHORT_ID_OCTETS]
                for start in range(0, len(keys), SHORT_ID_OCTETS)
            )
        )


def fingerprint(keys: Iterable[bytes]) -> str:
    """The keys' ids, XORed, in hexadecimal: short for any number of keys, in any order."""
    ids = (int.from_bytes(key, "big") for key in keys)
    return reduce(operator.xor, ids, 0).to_bytes(KEY_ID_OCTETS, "big").hex()


def _expect(version: int, kind: bytes, expected: bytes) -> None:
    if (version, kind) != (CONTROL_VERSION, expected):
        raise Malformed(f"a control message of version {version}, kind {kind!r}")


@cache
def mask_of(powers: frozenset[Power]) -> int:
    """As one octet: a bit for each."""
    return sum(1 << power for power in powers)


@cache
def powers_of(mask: int) -> frozenset[Power]:
    """Raises Malformed for a power that there is not, and for none."""
    powers = frozenset(power for power in Power if mask >> power & 1)
    if not powers or mask_of(powers) != mask:
        raise Malformed(f"a grant of powers 0x{mask:02x}")
    return powers
