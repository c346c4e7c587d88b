"""The messages between the supervisor and its resolver: a name is asked for, its addresses come.

Encoding and decoding only, no I/O. One message is one SOCK_SEQPACKET packet. The supervisor trusts
the resolver with where a name's connections go, and with nothing else: what it says is of a fixed
form and of limited length.

=====================  =======================================================
supervisor: question   number(4) family(1) name
resolver: ready        'R'                 confined; may be asked
resolver: alive        'A'
resolver: answer       number(4) error(4), and if that is 0, addresses: of IPv4
                       4 octets each; of IPv6 16, and the scope (4)
=====================  =======================================================
"""

import socket
import struct
from typing import NamedTuple

from titus_py.between.unprivileged import Malformed

__all__ = ["AT_ONCE", "MAX_ADDRESSES", "MAX_OCTETS", "Answer", "Question"]

#: How many questions of each family the resolver is asked at a time.
AT_ONCE = 8
#: How many addresses of a family are used. A name server decides how many there are.
MAX_ADDRESSES = 64
_MAX_NAME_OCTETS = 255

_QUESTION = struct.Struct("!IB")
_ANSWER = struct.Struct("!Ii")
_SCOPE = struct.Struct("!I")
_OCTETS = {socket.AF_INET: 4, socket.AF_INET6: 16 + _SCOPE.size}
#: One more than the longest message, so that a longer one is noticed.
MAX_OCTETS = _ANSWER.size + MAX_ADDRESSES * _OCTETS[socket.AF_INET6] + 1


class Question(NamedTuple):
    """A name, and the family of the addresses that are wanted: AF_INET or AF_INET6."""

    number: int
    family: int
    name: str

    def encode(self) -> bytes:
        return _QUESTION.pack(self.number, self.family) + self.name.encode("ascii")

    @classmethod
    def decode(cls, message: bytes) -> "Question":
        """For the resolver. Raises Malformed."""
        name = message[_QUESTION.size :]
        if not 1 <= len(name) <= _MAX_NAME_OCTETS or not name.isascii():
            raise Malformed(f"a question of {len(message)} octets")
        number, family = _QUESTION.unpack_from(message)
        if family not in _OCTETS:
            raise Malformed(f"a question for family {family}")
        return cls(number, family, name.decode())


class Answer(NamedTuple):
    """Addresses, each with its scope (0 but for link-local ones), or getaddrinfo(3)'s error."""

    number: int
    error: int
    addresses: tuple[tuple[str, int], ...]

    def encode(self, family: int) -> bytes:
        packed = [
            socket.inet_pton(family, host)
            + (_SCOPE.pack(scope) if family == socket.AF_INET6 else b"")
            for host, scope in self.addresses[:MAX_ADDRESSES]
        ]
        return _ANSWER.pack(self.number, self.error) + b"".join(packed)

    @staticmethod
    def number_of(message: bytes) -> int:
        """Which question it answers. Raises Malformed."""
        if not _ANSWER.size <= len(message) < MAX_OCTETS:
            raise Malformed(f"an answer of {len(message)} octets")
        number: int = _ANSWER.unpack_from(message)[0]
        return number

    @classmethod
    def decode(cls, message: bytes, family: int) -> "Answer":
        """For the supervisor; the family is that of the question. Raises Malformed."""
        number = cls.number_of(message)
        error = _ANSWER.unpack_from(message)[1]
        packed, each = message[_ANSWER.size :], _OCTETS[socket.AddressFamily(family)]
        count, left = divmod(len(packed), each)
        if left or count > MAX_ADDRESSES or bool(count) == bool(error):
            raise Malformed(f"an answer of {len(message)} octets with error {error}")
        addresses = []
        for start in range(0, len(packed), each):
            octets = packed[start : start + each]
            (scope,) = _SCOPE.unpack(octets[16:]) if family == socket.AF_INET6 else (0,)
            host = socket.inet_ntop(family, octets[:16] if each > 4 else octets)
            addresses.append((host, scope))
        return cls(number, error, tuple(addresses))
