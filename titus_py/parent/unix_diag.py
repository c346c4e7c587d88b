"""What the kernel knows of a unix socket, asked by its inode (sock_diag(7)).

Run by the parent where it accepts from one: the client's socket is a worker's by then, and that
one may be controlled by its peer.
"""

import struct

from titus_py.parent.sock_diag import CLOSE_WAIT, ESTABLISHED, Seen, SockDiag, attributes

__all__ = ["UnixDiag"]

_AF_UNIX = 1
_ANY_STATE, _NO_STATE, _NO_COOKIE = 0xFFFF_FFFF, 0, 0xFFFF_FFFF
#: struct unix_diag_req: family, protocol, pad, states, inode, show, cookie.
_QUESTION = struct.Struct("=BBHIIIII")
_SHOW_QUEUES = 0x10
#: struct unix_diag_msg, and its attributes.
_SOCKET_OCTETS = 16
_QUEUES, _SHUTDOWN = 4, 6
_UNREAD = struct.Struct("=I")
#: Either half of the stream (<net/sock.h>, SHUTDOWN_MASK).
_BOTH = 3
_UNKNOWN = float("inf")


class UnixDiag(SockDiag):
    """As ``SockDiag``, for unix sockets. The kernel does not time these."""

    def __init__(self) -> None:
        super().__init__(_question(0, _NO_STATE))

    def look_at(self, inode: int) -> Seen | None:
        """The socket; None if nobody has it any more.

        The state is CLOSE_WAIT once the peer has closed it. If the peer has only ended its half, it
        is there, and can read.
        """
        answer = self.answer(_question(inode, _ANY_STATE))
        if answer is None:
            return None
        found = dict(attributes(answer, _SOCKET_OCTETS))
        state = CLOSE_WAIT if found[_SHUTDOWN][0] == _BOTH else ESTABLISHED
        (unread,) = _UNREAD.unpack_from(found[_QUEUES])
        return Seen(state, _UNKNOWN, _UNKNOWN, 0, unread)


def _question(inode: int, states: int) -> bytes:
    return _QUESTION.pack(_AF_UNIX, 0, 0, states, inode, _SHOW_QUEUES, _NO_COOKIE, _NO_COOKIE)
