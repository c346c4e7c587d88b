"""Which sockets belong together: both ends of unix sockets, and the ports of TCP sockets.

Run by ``titus-py audit``, as root, in the instance's network namespace. It trusts the
kernel (sock_diag(7), proc_net_tcp(5)).
"""

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from titus_py.audit.network import in_network_of

__all__ = ["Tcp", "Unix", "tcp_lines", "tcp_sockets", "unix_sockets", "unix_sockets_of"]

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x1 | 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_UDIAG_SHOW_NAME, _UDIAG_SHOW_PEER = 0x1, 0x4
_UNIX_DIAG_NAME, _UNIX_DIAG_PEER = 0, 2
#: <net/tcp_states.h>, which unix sockets have as well.
_LISTENING = 10
_ALL = 0xFFFF_FFFF

_HEADER = struct.Struct("=IHHII")
#: struct unix_diag_req: family, protocol, pad, states, inode, show, cookie.
_REQUEST = struct.Struct("=BBHIIIII")
#: struct unix_diag_msg: family, type, state, pad, inode, cookie.
_MESSAGE = struct.Struct("=BBBBIII")
_ATTRIBUTE = struct.Struct("=HH")

_LISTEN = "0A"


class Unix(NamedTuple):
    """A unix socket; ``peer`` is the other end's inode, 0 if there is none (any more).

    ``local`` is the path that it has, or that its listening socket has; "" if there is none.
    """

    kind: int
    peer: int
    local: str
    listening: bool


class TcpLine(NamedTuple):
    """What proc_net_tcp(5) has of a socket: addresses with ports, and the state, in hexadecimal."""

    local: str
    remote: str
    state: str
    inode: int


class Tcp(NamedTuple):
    """A TCP socket, by its ports."""

    listening: bool
    local: int
    remote: int


def unix_sockets() -> dict[int, Unix] | None:
    """This network namespace's unix sockets by inode; None if the kernel lacks unix_diag."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            show = _UDIAG_SHOW_NAME | _UDIAG_SHOW_PEER
            request = _REQUEST.pack(socket.AF_UNIX, 0, 0, _ALL, 0, show, _ALL, _ALL)
            length = _HEADER.size + len(request)
            netlink.send(
                _HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0) + request
            )
            return dict(_answers(netlink))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL):
            return None
        raise


def unix_sockets_of(pid: int) -> dict[int, Unix]:
    """The unix sockets of this process's network namespace; none if it has ended."""
    found: dict[int, Unix] = {}
    in_network_of(pid, lambda: found.update(unix_sockets() or {}))
    return found


def _answers(netlink: socket.socket) -> Iterator[tuple[int, Unix]]:
    while True:
        octets = netlink.recv(1 << 18)
        while octets:
            length, kind, _, _, _ = _HEADER.unpack_from(octets)
            content = octets[_HEADER.size : length]
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                number = -struct.unpack_from("=i", content)[0]
                raise OSError(number, os.strerror(number))
            _, socket_kind, state, _, inode, _, _ = _MESSAGE.unpack_from(content)
            found = dict(_attributes(content[_MESSAGE.size :]))
            peer = int.from_bytes(found.get(_UNIX_DIAG_PEER, b"")[:4], sys.byteorder)
            name = os.fsdecode(found.get(_UNIX_DIAG_NAME, b"").rstrip(b"\0"))
            yield inode, Unix(socket_kind, peer, name, state == _LISTENING)
            octets = octets[length + 3 & ~3 :]


def _attributes(octets: bytes) -> Iterator[tuple[int, bytes]]:
    while len(octets) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(octets)
        yield kind, octets[_ATTRIBUTE.size : length]
        octets = octets[max(length, _ATTRIBUTE.size) + 3 & ~3 :]


def tcp_lines() -> Iterator[TcpLine]:
    """Of every TCP socket of this network namespace."""
    for name in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]
        except FileNotFoundError:  # a kernel without IPv6
            continue
        for line in lines:
            _, local, remote, state, *_, inode = line.split()[:10]
            yield TcpLine(local, remote, state, int(inode))


def tcp_sockets() -> dict[int, Tcp]:
    """This network namespace's TCP sockets by inode, except those that no process holds."""
    found = {}
    for local, remote, state, inode in tcp_lines():
        # No process holds a socket with inode 0, such as a connection in TIME_WAIT.
        if inode:
            ports = (int(address.rpartition(":")[2], 16) for address in (local, remote))
            found[inode] = Tcp(state == _LISTEN, *ports)
    return found
