"""Sending and receiving file descriptors with a message (unix(7), SCM_RIGHTS); what ends a socket.

Python's own socket.send_fds and socket.recv_fds take flags, and do not pass them on to the
kernel: with them, a process that must not block would block. And its socketpair makes each of the
two sockets twice.
"""

import errno
import struct
from _socket import socketpair
from collections.abc import Callable, Sequence
from socket import (
    AF_UNIX,
    CMSG_LEN,
    MSG_CMSG_CLOEXEC,
    MSG_DONTWAIT,
    SCM_RIGHTS,
    SOCK_SEQPACKET,
    SOL_SOCKET,
    SocketType,
)
from typing import TypeVar

__all__ = [
    "if_any",
    "inherited_descriptors",
    "packet_pair",
    "passes",
    "receive_descriptors",
    "receive_if_any",
    "send_descriptors",
]

#: Errors that say nothing of the other end: no room, no memory, or too many descriptors that are on
#: their way (unix(7)).
_PASSING = errno.EAGAIN, errno.ENOMEM, errno.ENOBUFS, errno.ETOOMANYREFS, errno.EINTR
_Received = TypeVar("_Received")
_INT = struct.Struct("=i")
#: As a plain number: Python's own is an enum, and each ``|`` of enums takes a dozen calls.
_CLOSE_ON_EXEC = int(MSG_CMSG_CLOEXEC)


def inherited_descriptors(arguments: Sequence[str]) -> dict[str, int]:
    """What one of our processes has started another with: ``--plan-fd 3``, or ``--plan-fd=3``.

    Not by argparse: what that loads is a tenth of all that such a process loads.
    """
    words = [word for argument in arguments for word in argument.split("=")]
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


def packet_pair() -> tuple[SocketType, SocketType]:
    """Two packet sockets that are connected to each other, close-on-exec. Raises OSError."""
    return socketpair(AF_UNIX, SOCK_SEQPACKET)


def send_descriptors(
    to: SocketType, octets: bytes, descriptors: Sequence[int], flags: int = 0
) -> None:
    """Send one message on a packet socket. Raises OSError; BlockingIOError if it would block."""
    packed = struct.pack(f"={len(descriptors)}i", *descriptors)
    to.sendmsg([octets], [(SOL_SOCKET, SCM_RIGHTS, packed)] if descriptors else [], flags)


def receive_descriptors(
    giver: SocketType, octets: int, count: int, flags: int = 0
) -> tuple[bytes, list[int]]:
    """Receive a message of at most so many octets and up to ``count`` descriptors, close-on-exec.

    An empty message is end of file. Raises OSError; BlockingIOError if it would block.
    """
    # CMSG_SPACE would be rounded up, to room for one more.
    message, ancillary, _, _ = giver.recvmsg(
        octets, CMSG_LEN(count * _INT.size), flags | _CLOSE_ON_EXEC
    )
    return message, [number for _, _, data in ancillary for (number,) in _INT.iter_unpack(data)]


def receive_if_any(giver: SocketType, octets: int, count: int) -> tuple[bytes, list[int]] | None:
    """The same without waiting; None if there is nothing yet, or no memory to receive it in.

    Any other error is end of file as well.
    """
    end: tuple[bytes, list[int]] = b"", []
    return if_any(lambda: receive_descriptors(giver, octets, count, MSG_DONTWAIT), end)


def if_any(receive: Callable[[], _Received], end: _Received) -> _Received | None:
    """What there is to ``receive`` from a socket; ``end`` once nothing more will come.

    None if there is nothing yet, or no memory to receive it in.
    """
    for _ in range(2):
        try:
            return receive()
        except ConnectionResetError:
            # Told once, where the other end was closed with something unread. What had come from
            # there is still to be read.
            continue
        except OSError as error:
            if passes(error):
                return None
            break
    return end


def passes(error: OSError) -> bool:
    """Whether this says nothing of the other end, so that the same may be tried again."""
    return error.errno in _PASSING
