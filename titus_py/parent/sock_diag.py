"""What the kernel knows of a TCP connection, asked by its two ends (sock_diag(7)).

Run by the parent, which has given the client's socket away: the worker that has it may be
controlled by its client by now, and is not asked. Reading this needs no capability.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple, Self

from titus_py.between.messages import Ends

__all__ = ["CLOSE_WAIT", "ESTABLISHED", "Seen", "SockDiag", "attributes", "not_available"]

#: <linux/netlink.h>, <linux/sock_diag.h>, <linux/inet_diag.h>.
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_NLMSG_ERROR, _NLM_F_REQUEST, _NLM_F_DUMP = 2, 0x1, 0x300
_INET_DIAG_INFO = 2
_NO_STATE, _ANY_STATE, _NO_COOKIE = 0, 0xFFFF_FFFF, 0xFFFF_FFFF
_HEADER = struct.Struct("=IHHII")
_QUESTION = struct.Struct("=BBBxI")
_PORTS = struct.Struct("!HH")
_REST = struct.Struct("=III")
_ERROR = struct.Struct("=i")
_ATTRIBUTE = struct.Struct("=HH")
#: Of struct tcp_info: when data was last sent, and last received, in ms before now.
_LAST_SENT, _LAST_RECEIVED, _MILLISECONDS = 44, 52, struct.Struct("=I")
#: And how many octets the peer has acknowledged so far.
_ACKNOWLEDGED, _OCTETS = 120, struct.Struct("=Q")
_ANSWER_OCTETS = 4096
#: Of struct inet_diag_msg: its length, and where the state is, and how many octets wait to be read.
_SOCKET_OCTETS, _STATE_PLACE, _UNREAD_PLACE, _UNREAD = 72, 1, 56, struct.Struct("=I")
#: <net/tcp_states.h>
ESTABLISHED, _TIME_WAIT, _CLOSE, CLOSE_WAIT, _LISTEN = 1, 6, 7, 8, 10
#: What is there in place of a connection that is over.
_GONE = frozenset({_TIME_WAIT, _CLOSE, _LISTEN})
_NOBODY = Ends("0.0.0.0", 0, "0.0.0.0", 0)


class Seen(NamedTuple):
    """A connection's state, and for how many seconds nothing was sent, and nothing received.

    Octets: how many the peer has acknowledged so far; how many have come and were not read yet.
    """

    state: int
    silent_out: float
    silent_in: float
    acknowledged: int
    unread: int


class SockDiag:
    """A socket to the kernel, open within ``with``: it is needed rarely.

    Raises OSError where the kernel does not answer, or a system call filter forbids to ask.
    ``nobody`` is a question about no socket, of the kind that will be asked.
    """

    def __init__(self, nobody: bytes | None = None) -> None:
        self._nobody = nobody or _question(_NOBODY, _NO_STATE)

    def __enter__(self) -> Self:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, kind, _NETLINK_SOCK_DIAG)
        try:
            # A kernel without the module tcp_diag says ENOENT, as for a connection that is over.
            # It says so even when asked for all sockets of no state.
            _error(self._ask(self._nobody, _NLM_F_DUMP))
        except OSError:
            self._socket.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def look(self, ends: Ends) -> Seen | None:
        """The connection between a peer ("client") and a local address; None if it is over."""
        answer = self.answer(_question(ends, _ANY_STATE))
        return None if answer is None else _seen(answer)

    def answer(self, question: bytes) -> bytes | None:
        """About one socket; None if there is none."""
        answer = self._ask(question)
        try:
            _error(answer)
        except FileNotFoundError:
            return None
        return answer

    def _ask(self, question: bytes, flags: int = 0) -> bytes:
        header = _HEADER.pack(
            _HEADER.size + len(question), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | flags, 0, 0
        )
        self._socket.send(header + question)
        # The kernel has answered by then.
        return self._socket.recv(_ANSWER_OCTETS)


def not_available(error: OSError) -> str:
    """What to tell if the kernel cannot be asked."""
    return f"sock_diag ({error.strerror})"


def _question(ends: Ends, states: int) -> bytes:
    family = socket.AF_INET6 if ":" in ends.client else socket.AF_INET
    host, _, interface = ends.client.partition("%")
    local = ends.server.partition("%")[0]
    return b"".join(
        (
            _QUESTION.pack(family, socket.IPPROTO_TCP, 1 << (_INET_DIAG_INFO - 1), states),
            _PORTS.pack(ends.server_port, ends.client_port),
            socket.inet_pton(family, local).ljust(16, b"\0"),
            socket.inet_pton(family, host).ljust(16, b"\0"),
            _REST.pack(_index(interface), _NO_COOKIE, _NO_COOKIE),
        )
    )


def _index(interface: str) -> int:
    """A link-local address is that of an interface, and so is a socket bound to one; 0: none."""
    if not interface or interface.isdecimal():
        return int(interface or 0)
    try:
        return socket.if_nametoindex(interface)
    except OSError:  # It has gone, and with it the connection.
        return 0


def _error(message: bytes) -> None:
    """Raises OSError if the kernel's answer is one."""
    if _HEADER.unpack_from(message)[1] == _NLMSG_ERROR:
        (error,) = _ERROR.unpack_from(message, _HEADER.size)
        raise OSError(-error, os.strerror(-error))


def attributes(message: bytes, after: int) -> Iterator[tuple[int, bytes]]:
    """What an answer says beyond its ``after`` octets about the socket, by its number."""
    place = _HEADER.size + after
    while place + _ATTRIBUTE.size <= len(message):
        length, name = _ATTRIBUTE.unpack_from(message, place)
        yield name, message[place + _ATTRIBUTE.size : place + length]
        place += (max(length, _ATTRIBUTE.size) + 3) & ~3


def _seen(message: bytes) -> Seen | None:
    state = message[_HEADER.size + _STATE_PLACE]
    if state in _GONE:
        return None
    for name, info in attributes(message, _SOCKET_OCTETS):
        if name == _INET_DIAG_INFO:
            (sent,) = _MILLISECONDS.unpack_from(info, _LAST_SENT)
            (received,) = _MILLISECONDS.unpack_from(info, _LAST_RECEIVED)
            (acknowledged,) = _OCTETS.unpack_from(info, _ACKNOWLEDGED)
            (unread,) = _UNREAD.unpack_from(message, _HEADER.size + _UNREAD_PLACE)
            return Seen(state, sent / 1000, received / 1000, acknowledged, unread)
    raise OSError(errno.ENODATA, "no tcp_info")
