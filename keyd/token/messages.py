"""What keyd and the process of a token say to each other: octets in, values out, and back.

Each message is one packet of a SOCK_SEQPACKET pair, integers in network byte order:

=========  ====================================================================
question   number(8) key(2) scheme(2) deadline_ms(8) digest(32..64)
answer     'A' number(8) signature(1..1024)
failure    'F' number(8) why(0..200, UTF-8)
ready      'R' for each key, in the order in which they were asked for, a length(2), and:
           'P' and its SubjectPublicKeyInfo, as far as the token has it;
           'N' and why it cannot be used (UTF-8)
down       'D' lasting(1) why(0..200, UTF-8)
=========  ====================================================================

``deadline_ms`` is a time of CLOCK_MONOTONIC: a question that is read after it is dropped.
"""

import struct
from typing import NamedTuple

__all__ = [
    "MAX_MESSAGE_OCTETS",
    "ORPHANED",
    "UNUSABLE",
    "Answer",
    "Down",
    "Failure",
    "Nonsense",
    "Question",
    "Ready",
    "decode",
]

#: How the state of a token begins that cannot be used. And that of one whose process has ended:
#: only another keyd starts it again.
UNUSABLE = "cannot be used: "
ORPHANED = UNUSABLE + "its process has ended, and needs keyd to be started anew"

_QUESTION = struct.Struct("!QHHQ")
_NUMBER = struct.Struct("!cQ")
_LENGTH = struct.Struct("!H")
_WHY_OCTETS = 200
_MAX_SIGNATURE_OCTETS = 1024
_DIGEST_OCTETS = (32, 48, 64)
#: For some sixty keys of RSA-8192 in one token.
MAX_MESSAGE_OCTETS = 65536


class Nonsense(ValueError):
    """A message that violates the format."""


class Question(NamedTuple):
    """What is to be signed, with which of the token's keys, by which SignatureScheme."""

    number: int
    key: int
    scheme: int
    deadline_ms: int
    digest: bytes

    def encode(self) -> bytes:
        return _QUESTION.pack(*self[:4]) + self.digest

    @classmethod
    def decode(cls, message: bytes) -> "Question":
        """Raises Nonsense."""
        digest = message[_QUESTION.size :]
        if len(digest) not in _DIGEST_OCTETS:
            raise Nonsense(f"a question of {len(message)} octets")
        number, key, scheme, deadline_ms = _QUESTION.unpack_from(message)
        return cls(number, key, scheme, deadline_ms, digest)


class Answer(NamedTuple):
    """The signature for a question."""

    number: int
    signature: bytes

    def encode(self) -> bytes:
        return _NUMBER.pack(b"A", self.number) + self.signature


class Failure(NamedTuple):
    """Why there is no signature for a question."""

    number: int
    why: str

    def encode(self) -> bytes:
        return _NUMBER.pack(b"F", self.number) + self.why.encode()[:_WHY_OCTETS]


class Ready(NamedTuple):
    """The token is logged in to. Of each key: the DER of its public part, or why not."""

    keys: tuple[bytes | str, ...]

    def encode(self) -> bytes:
        said = (b"P" + key if isinstance(key, bytes) else b"N" + key.encode() for key in self.keys)
        return b"R" + b"".join(_LENGTH.pack(len(key)) + key for key in said)


class Down(NamedTuple):
    """The token cannot be used; ``lasting``: and will not be tried again."""

    lasting: bool
    why: str

    def encode(self) -> bytes:
        return b"D" + bytes((self.lasting,)) + self.why.encode()[:_WHY_OCTETS]


def decode(message: bytes) -> Answer | Failure | Ready | Down:
    """A message of a token's process; raises Nonsense."""
    kind, rest = message[:1], message[1:]
    if kind in (b"A", b"F") and len(message) >= _NUMBER.size:
        _, number = _NUMBER.unpack_from(message)
        content = message[_NUMBER.size :]
        if kind == b"A" and 1 <= len(content) <= _MAX_SIGNATURE_OCTETS:
            return Answer(number, content)
        if kind == b"F" and len(content) <= _WHY_OCTETS:
            return Failure(number, _printable(content))
    elif kind == b"R":
        return Ready(tuple(_fields(rest)))
    elif kind == b"D" and rest[:1] in (b"\0", b"\1") and len(rest) <= 1 + _WHY_OCTETS:
        return Down(rest[0] == 1, _printable(rest[1:]))
    raise Nonsense(f"a message of {len(message)} octets")


def _fields(rest: bytes) -> list[bytes | str]:
    fields: list[bytes | str] = []
    while rest:
        length = int.from_bytes(rest[: _LENGTH.size], "big")
        field = rest[_LENGTH.size : _LENGTH.size + length]
        if len(rest) < _LENGTH.size or len(field) != length:
            raise Nonsense("keys that are cut off")
        if field[:1] not in (b"P", b"N"):
            raise Nonsense("a key of neither kind")
        fields.append(field[1:] if field[:1] == b"P" else _printable(field[1 : 1 + _WHY_OCTETS]))
        rest = rest[_LENGTH.size + length :]
    return fields


def _printable(octets: bytes) -> str:
    text = octets.decode(errors="replace")
    return "".join(character if character.isprintable() else "?" for character in text)
