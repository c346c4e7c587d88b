"""What a keyd that lends keys and one that borrows them say to each other: octets in, values out.

Run by both. They trust each other little: the lender takes what comes for a taken-over host's,
and the borrower for an upstream's that may answer anything. Nothing here does I/O.

The two are on different hosts, and between them is a stream. Each message is a length(4, of what
follows) and, integers in network byte order:

=========  =========================================================================
greeting   'G' version(1) n x key(32): from the lender, the keys that this borrower may use.
           The first message; sent again when they change, and when nothing else was sent for
           ``QUIET_SECONDS``, or ``BUSY_SECONDS`` while there are asks without an answer
ask        'A' id(8) deadline_ms(4) powers_mask(1) client_hello_length(4) client_hello and a
           request, as on a channel (``keyd.protocol``)
answer     'R' id(8) and a reply, likewise
heard      'H': from the borrower, for each greeting
=========  =========================================================================

``id`` is the borrower's choice. It has at most ``MAX_IN_FLIGHT`` asks without an answer. Answers
come in any order. ``deadline_ms`` is how long from now an answer is of use. ``powers_mask`` is what
the borrower itself would allow for this client; ``client_hello`` is empty where nobody has seen it.

A network that drops all packets tells neither end. So a greeting, and that it was heard, show each
of them that the other one is there, also where nothing is asked.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from keyd.protocol import (
    KEY_ID_OCTETS,
    MAX_CLIENT_HELLO_OCTETS,
    MAX_REPLY_OCTETS,
    MAX_REQUEST_IN_HANDSHAKE_OCTETS,
    Malformed,
    Power,
    Reply,
    Request,
    mask_of,
    powers_of,
)

__all__ = [
    "BUSY_SECONDS",
    "HEARD",
    "MAX_BORROWERS",
    "MAX_DEADLINE_MS",
    "MAX_FROM_BORROWER_OCTETS",
    "MAX_FROM_LENDER_OCTETS",
    "MAX_IN_FLIGHT",
    "MAX_LENT_KEYS",
    "MAX_STRANGERS",
    "QUIET_SECONDS",
    "SILENCE_SECONDS",
    "VERSION",
    "Answer",
    "Ask",
    "Assembler",
    "Greeting",
    "decode_from_borrower",
    "decode_from_lender",
]

VERSION = 1
#: How many asks a borrower may have without an answer, on one connection.
MAX_IN_FLIGHT = 256
#: How many clients a lender may have: what is told of all of them fits into one message.
MAX_BORROWERS = 64
#: Of how many others, that a virtual host knows and keyd does not, refusals are counted by name.
MAX_STRANGERS = 32
#: How many keys a greeting may list.
MAX_LENT_KEYS = 8192
#: A lender that has nothing to say repeats its greeting: what is between the two ends no
#: connection as idle, and the borrower sees when it has ended.
QUIET_SECONDS = 10.0
#: The same while it has something to answer: one that is slow is told from one that is gone.
BUSY_SECONDS = 1.0
#: How long either end may say nothing before the other one takes it for gone.
SILENCE_SECONDS = 3 * QUIET_SECONDS
#: The longest wait for an answer that may be asked for.
MAX_DEADLINE_MS = 60_000

_LENGTH = struct.Struct("!I")
_HEARD = b"H"
#: The whole message.
HEARD = _LENGTH.pack(len(_HEARD)) + _HEARD
_ASK = struct.Struct("!cQIBI")
_ANSWER = struct.Struct("!cQ")

#: The longest messages, without the length in front.
MAX_FROM_BORROWER_OCTETS = _ASK.size + MAX_CLIENT_HELLO_OCTETS + MAX_REQUEST_IN_HANDSHAKE_OCTETS
MAX_FROM_LENDER_OCTETS = max(2 + MAX_LENT_KEYS * KEY_ID_OCTETS, _ANSWER.size + MAX_REPLY_OCTETS)


class Greeting(NamedTuple):
    """The keys that the borrower may use: the SHA-256 of each SubjectPublicKeyInfo."""

    keys: frozenset[bytes]

    def encode(self) -> bytes:
        return _framed(b"G" + bytes((VERSION,)) + b"".join(sorted(self.keys)))

    @classmethod
    def decode(cls, message: bytes) -> "Greeting":
        """Raises Malformed, saying what is wrong with the message."""
        keys = message[2:]
        if message[:1] != b"G" or len(message) < 2:
            raise Malformed(f"{len(message)} octets that are no greeting")
        if message[1] != VERSION:
            raise Malformed(f"a greeting of version {message[1]}, and this keyd has {VERSION}")
        if len(keys) % KEY_ID_OCTETS or len(keys) > MAX_LENT_KEYS * KEY_ID_OCTETS:
            raise Malformed(f"a greeting of {len(message)} octets")
        starts = range(0, len(keys), KEY_ID_OCTETS)
        return cls(frozenset(keys[start : start + KEY_ID_OCTETS] for start in starts))


class Ask(NamedTuple):
    """What is to be signed or decrypted, for which client, and how long an answer is of use."""

    id: int
    deadline_ms: int
    powers: frozenset[Power]
    client_hello: bytes
    request: Request

    def encode(self) -> bytes:
        head = _ASK.pack(
            b"A", self.id, self.deadline_ms, mask_of(self.powers), len(self.client_hello)
        )
        return _framed(head + self.client_hello + self.request.encode())

    @classmethod
    def decode(cls, message: bytes) -> "Ask":
        """Raises Malformed, saying what is wrong with the message."""
        if len(message) < _ASK.size or message[:1] != b"A":
            raise Malformed(f"{len(message)} octets that ask for nothing")
        _, number, deadline_ms, mask, length = _ASK.unpack_from(message)
        if deadline_ms > MAX_DEADLINE_MS:
            raise Malformed(f"a wait of {deadline_ms} ms")
        end = _ASK.size + length
        if length > MAX_CLIENT_HELLO_OCTETS or end > len(message):
            raise Malformed(f"a ClientHello of {length} octets, in an ask of {len(message)}")
        request = Request.decode(message[end:])
        return cls(number, deadline_ms, powers_of(mask), message[_ASK.size : end], request)


class Answer(NamedTuple):
    """What came of the ask with this id."""

    id: int
    reply: Reply

    def encode(self) -> bytes:
        return _framed(_ANSWER.pack(b"R", self.id) + self.reply.encode())

    @classmethod
    def decode(cls, message: bytes) -> "Answer":
        """Raises Malformed, saying what is wrong with the message."""
        if len(message) < _ANSWER.size or message[:1] != b"R":
            raise Malformed(f"{len(message)} octets that answer nothing")
        _, number = _ANSWER.unpack_from(message)
        return cls(number, Reply.decode(message[_ANSWER.size :]))


def decode_from_lender(message: bytes) -> Greeting | Answer:
    """Raises Malformed, saying what is wrong with the message."""
    return Greeting.decode(message) if message[:1] == b"G" else Answer.decode(message)


def decode_from_borrower(message: bytes) -> Ask | None:
    """None: it has heard a greeting. Raises Malformed, saying what is wrong with the message."""
    return None if message == _HEARD else Ask.decode(message)


class Assembler:
    """Puts messages together from a stream's pieces.

    It holds at most one message that is not whole, and the piece that came last. ``most_octets`` is
    the longest that the peer may send.
    """

    def __init__(self, most_octets: int) -> None:
        self._most = most_octets
        self._octets = bytearray()

    def add(self, piece: bytes) -> None:
        self._octets += piece

    def has_next(self) -> bool:
        """Whether ``next`` has a message by now, or raises Malformed."""
        if len(self._octets) < _LENGTH.size:
            return False
        length: int = _LENGTH.unpack_from(self._octets)[0]
        return length > self._most or len(self._octets) >= _LENGTH.size + length

    def next(self) -> bytes | None:
        """The first one that is whole, without its length. Raises Malformed for a length."""
        if len(self._octets) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._octets)
        if not 0 < length <= self._most:
            raise Malformed(f"a message of {length} octets")
        end = _LENGTH.size + length
        if len(self._octets) < end:
            return None
        message = bytes(self._octets[_LENGTH.size : end])
        del self._octets[:end]
        return message

    def messages(self) -> Iterator[bytes]:
        """Those that are whole by now."""
        return iter(self.next, None)


def _framed(message: bytes) -> bytes:
    return _LENGTH.pack(len(message)) + message
