"""A name server that answers as it is told to, in a network and mount namespace of its own.

Run by ``test_names``, with unshare(1), for one of its scenes: what that finds, it prints as JSON.
"""

import errno
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from keyd.linux import seccomp
from titus_py.between.event_loop import EventLoop
from titus_py.between.lookups import MAX_OCTETS
from titus_py.configuration.address import NameAddress
from titus_py.resolver.system_calls import RESOLVING
from titus_py.supervisor.resolver import Resolver
from titus_py.supervisor.unprivileged import UnprivilegedProcess

from .certificates import Authority
from .instance import Instance
from .peers import Listener, TlsClient, echo, served_by
from .service import talk

#: netdevice(7).
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1

#: The resolver's.
UID = 2_000_000_001

A, AAAA = 1, 28
NO_ERROR, SERVER_FAILURE, NO_SUCH_NAME = 0, 2, 3

#: What there is of each name: an address, an error, or nothing: then there is no answer at all.
ZONE: dict[str, dict[int, str | int]] = {
    "both.test": {A: "127.0.0.2", AAAA: "::1"},
    "no-aaaa.test": {A: "127.0.0.1", AAAA: NO_ERROR},
    "aaaa-dropped.test": {A: "127.0.0.1"},
    "aaaa-failing.test": {A: "127.0.0.1", AAAA: SERVER_FAILURE},
    "a-dropped.test": {AAAA: "::1"},
    "unknown.test": {A: NO_SUCH_NAME, AAAA: NO_SUCH_NAME},
    "failing.test": {A: NO_ERROR, AAAA: SERVER_FAILURE},
    "in-hosts-file.test": {A: "127.0.0.9", AAAA: "::1"},
    "silent.test": {},
}
FILES = {
    "/etc/resolv.conf": "nameserver 127.0.0.1\n",
    "/etc/nsswitch.conf": "hosts: files dns\n",
    "/etc/hosts": "127.0.0.1 localhost\n127.0.0.7 x In-Hosts-File.test # of IPv4 alone\n",
}


def answer(query: bytes) -> bytes | None:
    """RFC 1035 §4.1: to one question, from the zone."""
    name, end = [], 12
    while query[end]:
        name.append(query[end + 1 : end + 1 + query[end]].decode())
        end += 1 + query[end]
    (kind,) = struct.unpack("!H", query[end + 1 : end + 3])
    found = ZONE.get(".".join(name).lower(), {A: NO_SUCH_NAME, AAAA: NO_SUCH_NAME}).get(kind)
    if found is None:
        return None
    record = b""
    if isinstance(found, str):
        family = socket.AF_INET6 if kind == AAAA else socket.AF_INET
        address = socket.inet_pton(family, found)
        record = struct.pack("!HHHIH", 0xC00C, kind, 1, 60, len(address)) + address
    code = found if isinstance(found, int) else NO_ERROR
    header = query[:2] + struct.pack("!HHHHH", 0x8180 | code, 1, bool(record), 0, 0)
    return header + query[12 : end + 5] + record


def serve_names() -> None:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 53))

    def run() -> None:
        while True:
            query, client = server.recvfrom(512)
            if (reply := answer(query)) is not None:
                server.sendto(reply, client)

    threading.Thread(target=run, daemon=True).start()


def prepare() -> None:
    """In namespaces of our own: a network with nobody else, and files that name its server."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        up = struct.pack("16sh14x", b"lo", _IFF_UP)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, up)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for path, text in FILES.items():
        with tempfile.NamedTemporaryFile("w", delete=False) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        Path(path).touch()
        subprocess.run(["mount", "--bind", file.name, os.path.realpath(path)], check=True)
        os.unlink(file.name)
    serve_names()


def resolving(loop: EventLoop, events: list[str]) -> UnprivilegedProcess:
    def note(event: str, level: str = "info", **fields: object) -> None:
        events.append(f"{event} {fields}")

    told = {"uid": UID, "filter": seccomp.build(RESOLVING, errno.ENOSYS).hex()}
    return UnprivilegedProcess(loop, note, "resolver", lambda: told, MAX_OCTETS)


def late() -> dict[str, list[object]]:
    """What is said of two names that are not there, until one of them is."""
    found: dict[str, list[object]] = {}
    loop, events = EventLoop(), list[str]()

    def take(backend: NameAddress, result: object) -> None:
        told = result.strerror if isinstance(result, OSError) else result
        found.setdefault(backend.name, []).append(told)

    lookups = Resolver(loop, resolving(loop, events), take)
    lookups.resolve([NameAddress("unknown.test", 80), NameAddress("late.test", 80)], 3600)
    while len(found) < 2:
        loop.run_once()
    ZONE["late.test"] = {A: "127.0.0.3", AAAA: NO_ERROR}
    while len(found["late.test"]) < 2:
        loop.run_once()
    lookups.stop()
    assert not events
    return found


def resolver() -> dict[str, list[object]]:
    """All that is said of each name, until something is said of all that are not silent."""
    found: dict[str, list[object]] = {}
    loop = EventLoop()

    def take(backend: NameAddress, result: object) -> None:
        told = result.strerror if isinstance(result, OSError) else result
        found.setdefault(backend.name, []).append(told)

    names = [NameAddress(name, 80) for name in ZONE]
    events: list[str] = []
    lookups = Resolver(loop, resolving(loop, events), take)
    lookups.resolve(names, 3600)
    while len(found) < len(ZONE) - 1 or len(found["both.test"]) < 2:
        loop.run_once()
    # More that are half answered than are asked for at a time.
    more = [NameAddress(f"dropped-{number}.test", 80) for number in range(20)]
    ZONE.update((name.name, {A: "127.0.0.1"}) for name in more)
    lookups.resolve([*names, *more], 3600)
    while not found.keys() >= {name.name for name in more}:
        loop.run_once()
    lookups.stop()
    assert not events
    return found


def start() -> dict[str, list[str]]:
    """An instance for each of two names: what its log says of backends until it listens.

    A client comes to the first as soon as it listens.
    """
    with (
        tempfile.TemporaryDirectory() as directory,
        Listener.tcp() as backend,
        served_by(backend, echo),
    ):
        certificate = Authority(Path(directory)).issue()
        instances = {}
        for port, name in enumerate(("aaaa-dropped.test", "silent.test"), 8000):
            (own := Path(directory, name)).mkdir()
            vhost = certificate._asdict() | {"backend": f"{name}:{backend.port}"}
            del vhost["authority"]
            tables = {"listen": [{"address": f"127.0.0.1:{port}"}], "vhost": [vhost]}
            instances[name] = Instance.from_tables(own, tables)
        try:
            first, _ = instances.values()
            first.wait_for_event("listening")
            with TlsClient(first.port) as client:
                assert talk(client.handshake())
            for instance in instances.values():
                instance.wait_for_event("listening")
            return {
                name: [
                    event["event"]
                    for event in instance.events()
                    if event["event"] in ("backend_unresolved", "backend_unavailable", "listening")
                ]
                for name, instance in instances.items()
            }
        finally:
            for instance in instances.values():
                instance.close()


SCENES: dict[str, Callable[[], object]] = {"resolver": resolver, "late": late, "start": start}

if __name__ == "__main__":
    prepare()
    json.dump(SCENES[sys.argv[1]](), sys.stdout)
