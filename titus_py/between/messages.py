"""The messages between the parent and its fork server, and between the parent and a worker.

Encoding and decoding only, no I/O. One message is one SOCK_SEQPACKET packet. A worker sends
four kinds of message, of a fixed size or with fixed maxima. The parent trusts neither.

===================  =========================================================
worker: ready        'R'                    confined; may be given a client
worker: proxied      'P' known(1) client(16) port(2) server(16) port(2)
                     the load balancer's header: its two addresses, IPv4 as IPv4-mapped,
                     or all zeros where it names none; once, before all other octets
worker: dial         'D' vhost(2) protocol(1)
                     connect me to the backend that this host has for the protocol:
                     its place in the host's alpn, or 255 where none was negotiated.
                     For a host that sends TLS facts to its backend, there follow, each
                     with its length(1): TLS version, cipher suite, server name
worker: established  'E'                    of a tunnel: the server is whom it should be
parent: client       'C' proxy_timeout(4) vhosts(n x 2), with the
                     client's socket and, where there is a vhost at all, the channel
                     to keyd; milliseconds for a load balancer's header, 0: none comes
parent: tunnel       'T' tunnel(2) keyed(1), with the channel to keyd where there is one, the
                     client's socket and the server's, which is connected
parent: channel      'K', with a channel to keyd, in place of one whose keyd has ended; or
                     without, if none comes; for the provider (keyd/provider/channel.c)
parent: backend      'B', with the connected socket; or 'F' and why there is none
parent: fork         'W' uid(4), with the descriptor of the new worker's report and
                     its end of its socket
fork server: ready   'R' huge_pages(4)      confined; may be asked for workers, which share so
                     huge_pages_of_code(4)  many huge pages
fork server: forked  'P' uid(4) pid(4), with the worker's pidfd
fork server: failed  'E' uid(4) errno(4)
fork server: leaving 'L' why                its last message
===================  =========================================================
"""

import socket
import struct
from typing import NamedTuple

__all__ = [
    "FORK_SERVER_OCTETS",
    "MAX_CLIENT_OCTETS",
    "Client",
    "Dial",
    "Ends",
    "Established",
    "Fork",
    "Forked",
    "Leaving",
    "Malformed",
    "Prepared",
    "Proxied",
    "Ready",
    "TlsFacts",
    "Tunnel",
    "decode_from_fork_server",
    "decode_from_worker",
]

TUNNEL = b"T"
CHANNEL = b"K"
BACKEND = b"B"
BACKEND_FAILED = b"F"
#: The longest answer about a backend: its kind and a short reason.
MAX_BACKEND_OCTETS = 256

_DIAL = struct.Struct("!cHB")
_PROXIED = struct.Struct("!c?16sH16sH")
_NO_PROTOCOL = 255
#: The longest of each text in TlsFacts: a server name is no longer than 255 (RFC 1035 §2.3.4).
_FACTS_OCTETS = (16, 64, 255)
#: These have a uid as a system call takes it: 8 octets in this machine's order.
_FORK = struct.Struct("=cq")
_FORKED = struct.Struct("=cqI")
_PREPARED = struct.Struct("!cII")
_CLIENT = struct.Struct("!cI")
_TUNNEL = struct.Struct("!cH?")
#: How many protocols a virtual host may have: a dial has one octet to name one, or none.
MAX_PROTOCOLS = _NO_PROTOCOL
#: How many virtual hosts there may be: a client's message may name all of them.
MAX_VHOSTS = 4096
#: Of a client's message, or a tunnel's.
MAX_CLIENT_OCTETS = _CLIENT.size + 2 * MAX_VHOSTS
#: One more than a worker's longest message, so that a longer one is noticed.
WORKER_MESSAGE_OCTETS = _DIAL.size + sum(1 + most for most in _FACTS_OCTETS) + 1
FORKED_OCTETS = _FORKED.size
_MAX_WHY_OCTETS = 200
#: One more than the fork server's longest message.
FORK_SERVER_OCTETS = 1 + _MAX_WHY_OCTETS + 1


#: The kernel's own bounds (MAX_ERRNO, PID_MAX_LIMIT).
_MOST_ERRNO, _MOST_PID = 4095, 1 << 22


class Malformed(ValueError):
    """A message that a worker never sends while it runs our code."""


class Ready(NamedTuple):
    """The worker is confined."""

    def encode(self) -> bytes:
        return b"R"


class Ends(NamedTuple):
    """The two ends of a client's connection: numeric addresses, and ports."""

    client: str
    client_port: int
    server: str
    server_port: int


class Proxied(NamedTuple):
    """What a load balancer's header says; None: to take the connection's own addresses."""

    ends: Ends | None

    def encode(self) -> bytes:
        if self.ends is None:
            return _PROXIED.pack(b"P", False, b"", 0, b"", 0)
        client, client_port, server, server_port = self.ends
        return _PROXIED.pack(b"P", True, _packed(client), client_port, _packed(server), server_port)

    @classmethod
    def decode(cls, message: bytes) -> "Proxied":
        """For the parent, which does not trust the worker. Raises Malformed."""
        _, known, client, client_port, server, server_port = _PROXIED.unpack(message)
        ends = Ends(_text(client), client_port, _text(server), server_port)
        proxied = cls(ends if known else None)
        if proxied.encode() != message:
            raise Malformed("an address that is not in its usual form")
        return proxied


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6, address if ":" in address else f"::ffff:{address}")


def _text(octets: bytes) -> str:
    """An IPv4-mapped address (RFC 4291 §2.5.5.2) is the IPv4 address that it stands for."""
    if octets.startswith(b"\0" * 10 + b"\xff\xff"):
        return socket.inet_ntop(socket.AF_INET, octets[12:])
    return socket.inet_ntop(socket.AF_INET6, octets)


class TlsFacts(NamedTuple):
    """What a worker says of its client's TLS: printable ASCII; the name is empty if none was sent.

    Version and suite are in OpenSSL's words.
    """

    version: str
    cipher_suite: str
    server_name: str

    def encode(self) -> bytes:
        return b"".join(bytes((len(text),)) + text.encode() for text in self)

    @classmethod
    def decode(cls, octets: bytes) -> "TlsFacts":
        """For the parent, which does not trust the worker. Raises Malformed."""
        texts = []
        for most in _FACTS_OCTETS:
            length = octets[0] if octets else most + 1
            text = octets[1 : 1 + length].decode("latin-1")
            if length > most or len(text) < length or not (text.isascii() and text.isprintable()):
                raise Malformed(f"TLS facts of {len(octets)} octets")
            texts.append(text)
            octets = octets[1 + length :]
        if octets:
            raise Malformed(f"{len(octets)} octets after the TLS facts")
        return cls(*texts)


class Dial(NamedTuple):
    """The worker wants the backend that this virtual host has for a protocol.

    ``protocol`` is the protocol's index in the virtual host's ``alpn``, or None if the client and
    the worker negotiated none.
    """

    vhost: int
    protocol: int | None
    #: Exactly for a virtual host that passes them on to its backend.
    facts: TlsFacts | None = None

    def encode(self) -> bytes:
        protocol = _NO_PROTOCOL if self.protocol is None else self.protocol
        facts = b"" if self.facts is None else self.facts.encode()
        return _DIAL.pack(b"D", self.vhost, protocol) + facts


class Established(NamedTuple):
    """The handshake of a tunnel's connection is done, and the server is whom it should be."""

    def encode(self) -> bytes:
        return b"E"


class Client(NamedTuple):
    """A connection to serve; ``vhosts`` are those that its local address allows.

    ``proxy_timeout``: how many milliseconds a load balancer has for its header. 0: none comes.
    Nothing here tells how many connections there are, or have been.
    """

    vhosts: tuple[int, ...]
    proxy_timeout: int = 0

    def encode(self) -> bytes:
        numbers = struct.pack(f"!{len(self.vhosts)}H", *self.vhosts)
        return _CLIENT.pack(b"C", self.proxy_timeout) + numbers

    @classmethod
    def decode(cls, message: bytes) -> "Client":
        """For the worker, which trusts the parent."""
        _, proxy_timeout = _CLIENT.unpack_from(message)
        count = (len(message) - _CLIENT.size) // 2
        vhosts = struct.unpack_from(f"!{count}H", message, _CLIENT.size)
        return cls(vhosts, proxy_timeout)


class Tunnel(NamedTuple):
    """A connection to carry through a tunnel; ``keyed``: a channel to keyd comes with it."""

    number: int
    keyed: bool

    def encode(self) -> bytes:
        return _TUNNEL.pack(TUNNEL, self.number, self.keyed)

    @classmethod
    def decode(cls, message: bytes) -> "Tunnel":
        """For the worker, which trusts the parent."""
        _, number, keyed = _TUNNEL.unpack(message)
        return cls(number, keyed)


class Prepared(NamedTuple):
    """The fork server is confined; what workers inherit is on so many huge pages, and code."""

    huge_pages: int
    huge_pages_of_code: int

    def encode(self) -> bytes:
        return _PREPARED.pack(b"R", *self)


class Fork(NamedTuple):
    """An order to the fork server: a worker with this uid. ``orders.c`` takes it."""

    uid: int

    def encode(self) -> bytes:
        return _FORK.pack(b"W", self.uid)


class Forked(NamedTuple):
    """The result of an order: the worker's pid, or the errno with which forking failed.

    ``orders.c`` makes it.
    """

    uid: int
    pid: int
    error: int = 0

    @classmethod
    def decode(cls, message: bytes) -> "Forked":
        """For the parent; raises Malformed."""
        if len(message) != _FORKED.size:
            raise Malformed(f"{len(message)} octets")
        kind, uid, number = _FORKED.unpack(message)
        if kind == b"E" and 0 < number <= _MOST_ERRNO:
            return cls(uid, 0, number)
        if kind == b"P" and 0 < number <= _MOST_PID:
            return cls(uid, number)
        raise Malformed(f"{kind!r}, {number}")


class Leaving(NamedTuple):
    """Why the fork server ends. To a log that is a file, it could write nothing (RLIMIT_FSIZE)."""

    why: str

    def encode(self) -> bytes:
        why = "".join(one if one.isprintable() else "?" for one in self.why)
        return b"L" + why.encode("ascii", "replace")[:_MAX_WHY_OCTETS]


def decode_from_fork_server(message: bytes) -> Prepared | Forked | Leaving:
    """For the parent; raises Malformed."""
    if len(message) == _PREPARED.size and message[:1] == b"R":
        return Prepared(*_PREPARED.unpack(message)[1:])
    if message[:1] != b"L":
        return Forked.decode(message)
    why = message[1:].decode("ascii", "replace")
    if len(message) >= FORK_SERVER_OCTETS or not (why.isascii() and why.isprintable()):
        raise Malformed("a reason that is none")
    return Leaving(why)


def decode_from_worker(message: bytes) -> Ready | Proxied | Dial | Established:
    """Decode a worker's message; raises Malformed, which says what is wrong with it."""
    if message == b"R":
        return Ready()
    if message == b"E":
        return Established()
    if _DIAL.size <= len(message) < WORKER_MESSAGE_OCTETS and message[:1] == b"D":
        _, vhost, protocol = _DIAL.unpack_from(message)
        facts = TlsFacts.decode(message[_DIAL.size :]) if len(message) > _DIAL.size else None
        return Dial(vhost, None if protocol == _NO_PROTOCOL else protocol, facts)
    if len(message) == _PROXIED.size and message[:1] == b"P":
        return Proxied.decode(message)
    raise Malformed(f"{len(message)} octets, the first {message[:1]!r}")
