"""Addresses that titus-py could not listen on as things are: warnings of ``titus-py check``.

Run by ``titus-py check`` alone, as whoever calls it. An address is tried by binding a socket to it
for a moment, without listening. What is in use may be free by the time that titus-py starts.
"""

import errno
import re
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from keyd.printable import printable
from titus_py.configuration import Configuration, Mistake, Source
from titus_py.configuration.address import IPAddress

__all__ = ["taken_addresses"]

_LISTENING = "0A"  # TCP_LISTEN in /proc/net/tcp (proc(5))
#: systemd may listen for titus-py (titus-py.socket).
_SYSTEMD = 1
#: What the processes of titus-py are called that have its sockets.
_OURS = re.compile("titus-|keyd")
#: All addresses, as the kernel's tables have them.
_ANY = {"0" * 8, "0" * 32}


class _Process(NamedTuple):
    pid: int
    name: str


#: The processes that have a socket, by its inode.
_Holders = Callable[[], Mapping[str, list[_Process]]]


def taken_addresses(
    configuration: Configuration, source: Source, free_bind: bool = False
) -> Iterator[Mistake]:
    """With ``free_bind``, systemd listens, also on addresses that are not here yet."""
    elsewhere = configuration.transparent_addresses
    holders = cache(_holders)
    for setting, address in _addresses(configuration):
        if address in elsewhere:
            continue  # it may be another machine's
        if reason := _why_not(address, free_bind, holders):
            yield source.mistake(setting, f"{address}: {reason}: as it is, titus-py cannot start")


def _addresses(configuration: Configuration) -> Iterator[tuple[str, IPAddress]]:
    addresses = [
        *((f"listen[{i}].address", one.address) for i, one in enumerate(configuration.listen)),
        *((f"tunnel[{i}].listen", one.listen) for i, one in enumerate(configuration.tunnel)),
        ("metrics.address", configuration.metrics.address),
    ]
    for setting, address in addresses:
        if isinstance(address, IPAddress):
            yield setting, address


def _why_not(address: IPAddress, free_bind: bool, holders: _Holders) -> str:
    """Why nobody can listen there; "" if somebody can, or titus-py does, or it is not known."""
    try:
        with socket.socket(address.family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if address.family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.host != "::")
            probe.bind(address.sockaddr())
    except OSError as error:
        if error.errno == errno.ENODEV:
            return error.strerror or ""
        if error.errno == errno.EADDRNOTAVAIL and not free_bind:
            return "no interface of this machine has it"
        if error.errno == errno.EADDRINUSE:
            return _used_by(address, holders())
    return ""


def _used_by(address: IPAddress, holders: Mapping[str, list[_Process]]) -> str:
    """Who listens there; "" if that is titus-py or its socket unit, or cannot be seen."""
    found = sorted({one for inode in _listening(address) for one in holders.get(inode, ())})
    if not found or any(one.pid == _SYSTEMD or _OURS.match(one.name) for one in found):
        return ""
    return f"{printable(found[0].name)} listens there (process {found[0].pid})"


def _listening(address: IPAddress) -> Iterator[str]:
    """The inodes of the sockets that listen on this address, or on all."""
    octets = socket.inet_pton(address.family, address.host.partition("%")[0])
    # The kernel writes each four octets as a number of the machine's.
    words = struct.unpack(f"={len(octets) // 4}I", octets)
    wanted = "".join(f"{word:08X}" for word in words)
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = line.split()[:10]
                host, port = local.split(":")
                same = wanted in _ANY or host in {wanted, *_ANY}
                if state == _LISTENING and int(port, 16) == address.port and same:
                    yield f"socket:[{inode}]"


def _holders() -> Mapping[str, list[_Process]]:
    holders: dict[str, list[_Process]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        # It may end meanwhile, and close what it has.
        with suppress(OSError):
            name = (process / "comm").read_text(errors="replace").strip()
            for one in process.glob("fd/*"):
                with suppress(OSError):
                    inode = str(one.readlink())
                    if inode.startswith("socket:"):
                        holders.setdefault(inode, []).append(_Process(int(process.name), name))
    return holders
