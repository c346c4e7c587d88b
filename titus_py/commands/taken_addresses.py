"""Addresses that titus-py could not listen on as things are: warnings of ``titus-py check``.

Run by ``titus-py check`` alone, as whoever calls it. An address is tried by binding a socket to it
for a moment, without listening. What is in use may be free by the time that titus-py starts.
"""

import errno
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from keyd.printable import printable
from titus_py.configuration import Configuration, Mistake, Source
from titus_py.configuration.address import IPAddress

__all__ = ["taken_addresses"]

_LISTENING = "0A"  # TCP_LISTEN in /proc/net/tcp (proc(5))
#: systemd may listen for titus-py (titus-py.socket).
_SYSTEMD = 1


def taken_addresses(configuration: Configuration, source: Source) -> Iterator[Mistake]:
    elsewhere = configuration.transparent_addresses
    for setting, address in _addresses(configuration):
        if address in elsewhere:
            continue  # it may be another machine's
        if reason := _why_not(address):
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


def _why_not(address: IPAddress) -> str:
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
        if error.errno == errno.EADDRNOTAVAIL:
            return "no interface of this machine has it"
        if error.errno == errno.EADDRINUSE:
            return _used_by(address.port)
    return ""


def _used_by(port: int) -> str:
    """Who listens on this port; "" if that is titus-py or its socket unit, or cannot be seen."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == _LISTENING and local.endswith(f":{port:04X}"):
                inodes.add(f"socket:[{inode}]")
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            if not any(str(one.readlink()) in inodes for one in process.glob("fd/*")):
                continue
            name = (process / "comm").read_text(errors="replace").strip()
        except OSError:
            continue
        if int(process.name) == _SYSTEMD or re.match("titus-py|keyd", name):
            return ""
        return f"{printable(name)} listens there (process {process.name})"
    return ""
