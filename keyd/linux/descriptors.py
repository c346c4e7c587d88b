"""Sending and receiving file descriptors with a message (unix(7), SCM_RIGHTS).

Python's own socket.send_fds and socket.recv_fds take flags, and do not pass them on to the
kernel: with them, a process that must not block would block.
"""

import struct
from collections.abc import Sequence
from socket import CMSG_SPACE, MSG_CMSG_CLOEXEC, SCM_RIGHTS, SOL_SOCKET, SocketType

__all__ = ["receive_descriptors", "send_descriptors"]

_INT = struct.Struct("=i")


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
    message, ancillary, _, _ = giver.recvmsg(
        octets, CMSG_SPACE(count * _INT.size), flags | MSG_CMSG_CLOEXEC
    )
    return message, [number for _, _, data in ancillary for (number,) in _INT.iter_unpack(data)]
