"""What /proc says of an instance at one time: of each process, and of all of them.

Run by ``titus-py audit``, as root. It trusts the kernel. Processes come and go while they
are looked at. A process that has ended is left out; what did not fit together is looked at
again (``run``).
"""

import os
import re
import socket
import time
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from titus_py.audit.instance import (
    Process,
    Role,
    all_processes,
    descriptors,
    namespaces,
    status,
)
from titus_py.audit.sockets import Tcp, Unix, tcp_sockets, unix_sockets, unix_sockets_of
from titus_py.audit.target import Target

__all__ = ["Mapping", "Observation", "Scene", "Stage", "has_backend", "mappings_of", "stage_of"]

_SOCKET = re.compile(r"socket:\[(\d+)\]")
_LIMIT = re.compile(r"(.+?)  +(\S+) +(\S+) *(\S*)")


class Stage(StrEnum):
    """How far a worker has come."""

    SPARE = "spare"
    HANDSHAKE = "in its handshake"
    ESTABLISHED = "established"


class Mapping(NamedTuple):
    """A line of /proc/PID/maps."""

    start: int
    end: int
    permissions: str
    name: str


class Observation(NamedTuple):
    """One process, as /proc has it."""

    process: Process
    #: A worker's stage (``stage_of``); empty for other processes.
    stage: str
    #: /proc/PID/status of each thread, the main one first.
    threads: tuple[dict[str, str], ...]
    namespaces: dict[str, str]
    root: str
    cwd: str
    #: Its threads that have a root, a working directory or a namespace of their own (clone(2)).
    apart: tuple[int, ...]
    #: The names in the root directory; its owner and its mode.
    root_content: tuple[str, ...]
    root_owner: int
    root_mode: int
    #: Soft and hard limit, by name.
    limits: dict[str, tuple[str, str]]
    descriptors: dict[int, str]
    mappings: tuple[Mapping, ...]
    arguments: tuple[bytes, ...]
    environment: tuple[bytes, ...]
    #: The uid that owns /proc/PID/environ: root's if the process is not dumpable.
    owner_of_proc: int

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def sockets(self) -> dict[int, int]:
        """Its descriptors that are sockets, with their inodes."""
        return _sockets(self.descriptors)


class Scene:
    """All processes of an instance at one time, and what it takes to judge them."""

    def __init__(self, target: Target, deadline: float = 0.0) -> None:
        """Until ``deadline`` (time.monotonic), wait for workers that are confining themselves."""
        self.target = target
        self.inherited_filters = _filters(status(target.supervisor.pid))
        self.observations: list[Observation] = []
        for process in target.processes():
            try:
                if process.role is Role.WORKER:
                    process = self._once_confined(process, deadline)
                self.observations.append(_observe(process))
            except (FileNotFoundError, ProcessLookupError):
                continue
        # After the descriptors: a socket that is missing here was closed since.
        self._unix = unix_sockets()
        for seen in self.observations:
            if self._unix is not None and seen.process.role in (Role.KEYD, Role.CONNECTOR):
                # Sockets that keyd has opened in a network namespace that a service manager made,
                # and connections that it was given out of another one.
                self._unix |= unix_sockets_of(seen.pid)
        self._tcp = tcp_sockets()
        keyds = {seen.pid for seen in self.of(Role.KEYD)}
        # A keyd of its own has children that it made before it had a key, as the one that reads key
        # files again: they share what it has. Since it serves, its filter makes no process.
        self.everyone = [process for process in all_processes() if process.ppid not in keyds]
        self.observations = [
            seen._replace(stage=stage_of(seen, self)) if seen.process.role is Role.WORKER else seen
            for seen in self.observations
        ]

    def _once_confined(self, process: Process, deadline: float) -> Process:
        """Wait until a worker has a filter, its last step; returns it with the uid it has then."""
        while True:
            fields = status(process.pid)
            if _filters(fields) > self.inherited_filters or time.monotonic() > deadline:
                return process._replace(uid=int(fields["Uid"].split()[1]))
            time.sleep(0.02)

    def of(self, *roles: Role) -> list[Observation]:
        return [seen for seen in self.observations if seen.process.role in roles]

    def newest(self, role: Role) -> Observation | None:
        """Of several generations' parents or keyds, the one that serves new clients."""
        return max(self.of(role), key=lambda seen: seen.process.started, default=None)

    @property
    def knows_peers(self) -> bool:
        """Whether the kernel tells the other ends of unix sockets."""
        return self._unix is not None

    def unix(self, inode: int) -> Unix | None:
        return (self._unix or {}).get(inode)

    def tcp(self, inode: int) -> Tcp | None:
        return self._tcp.get(inode)

    @cached_property
    def holders(self) -> dict[int, list[Observation]]:
        """The processes of the instance that hold a socket, by its inode."""
        found: dict[int, list[Observation]] = {}
        for seen in self.observations:
            for inode in seen.sockets.values():
                found.setdefault(inode, []).append(seen)
        return found

    @cached_property
    def inhabitants(self) -> dict[str, set[int]]:
        """The processes of the machine that are in a namespace, as far as they are visible."""
        found: dict[str, set[int]] = {}
        for process in self.everyone:
            try:
                kinds = namespaces(process.pid)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                # It has ended; or it is outside of our container, and closed even to root in it.
                continue
            for namespace in kinds.values():
                found.setdefault(namespace, set()).add(process.pid)
        return found

    @property
    def listening(self) -> frozenset[int | str]:
        return self.target.listening

    @cached_property
    def secret_files(self) -> dict[tuple[int, int], Path]:
        """Files of keys and passphrases, by device and inode."""
        found = {}
        for files in self.target.key_files():
            for path in files:
                if path is not None:
                    found[(stat := path.stat()).st_dev, stat.st_ino] = path
        return found


def stage_of(worker: Observation, scene: Scene) -> Stage:
    """A worker's stage, by its sockets."""
    client, backend = _ends(worker.sockets.values(), scene.tcp, scene.unix, scene.listening)
    if backend:
        return Stage.ESTABLISHED
    return Stage.HANDSHAKE if client else Stage.SPARE


def has_backend(worker: Process, target: Target) -> bool:
    """Whether a worker holds a connection to a backend by now.

    Raises FileNotFoundError or ProcessLookupError if it has ended.
    """
    inodes = _sockets(descriptors(worker.pid)).values()
    unix = unix_sockets() or {}
    return _ends(inodes, tcp_sockets().get, unix.get, target.listening)[1]


def _ends(
    inodes: Iterable[int],
    tcp: Callable[[int], Tcp | None],
    unix: Callable[[int], Unix | None],
    listening: Container[int | str],
) -> tuple[bool, bool]:
    """Whether one of a worker's sockets is a client's, and whether one is a backend's."""
    client = backend = False
    for inode in inodes:
        found = tcp(inode) or unix(inode)
        if found is None or (isinstance(found, Unix) and found.kind != socket.SOCK_STREAM):
            continue
        if found.local in listening:
            client = True
        else:
            backend = True
    return client, backend


def _sockets(descriptors: dict[int, str]) -> dict[int, int]:
    """Those of a process's descriptors that are sockets, with their inodes."""
    found = {number: _SOCKET.fullmatch(what) for number, what in descriptors.items()}
    return {number: int(match[1]) for number, match in found.items() if match}


def _filters(fields: dict[str, str]) -> int:
    """How many filters there are; where the kernel does not say, 1 if there are any."""
    return int(fields.get("Seccomp_filters", int(fields["Seccomp"] == "2")))


def _observe(process: Process) -> Observation:
    """Raises FileNotFoundError or ProcessLookupError if it has ended."""
    proc = Path(f"/proc/{process.pid}")
    root = proc / "root"
    root_stat = root.stat()
    threads = tuple(_threads(process.pid))
    own = _surroundings(process.pid)
    return Observation(
        process=process,
        stage="",
        threads=threads,
        namespaces=namespaces(process.pid),
        root=os.readlink(root),
        cwd=os.readlink(proc / "cwd"),
        apart=tuple(_apart(process.pid, own, [int(one["Pid"]) for one in threads])),
        root_content=tuple(sorted(os.listdir(f"{root}/"))),
        root_owner=root_stat.st_uid,
        root_mode=root_stat.st_mode & 0o7777,
        limits=dict(_limits((proc / "limits").read_text())),
        descriptors=descriptors(process.pid),
        mappings=tuple(mappings_of((proc / "maps").read_bytes())),
        arguments=_words((proc / "cmdline").read_bytes()),
        environment=_words((proc / "environ").read_bytes()),
        owner_of_proc=(proc / "environ").stat().st_uid,
    )


def _threads(pid: int) -> Iterable[dict[str, str]]:
    for thread in sorted(int(name) for name in os.listdir(f"/proc/{pid}/task")):
        try:
            yield status(thread)
        except (FileNotFoundError, ProcessLookupError):
            if thread == pid:
                raise


def _surroundings(thread: int) -> tuple[object, ...]:
    directories = (os.readlink(f"/proc/{thread}/{name}") for name in ("root", "cwd"))
    return namespaces(thread), *directories


def _apart(pid: int, own: tuple[object, ...], threads: Iterable[int]) -> Iterable[int]:
    for thread in threads:
        with suppress(FileNotFoundError, ProcessLookupError):
            if thread != pid and _surroundings(thread) != own:
                yield thread


def _limits(text: str) -> Iterable[tuple[str, tuple[str, str]]]:
    for line in text.splitlines()[1:]:
        if match := _LIMIT.fullmatch(line.rstrip()):
            yield match[1].removeprefix("Max "), (match[2], match[3])


def mappings_of(maps: bytes) -> Iterable[Mapping]:
    """The lines of /proc/PID/maps. A file's name may have what Python takes for the end of one."""
    for line in maps.decode(errors="replace").split("\n")[:-1]:
        addresses, permissions, _, _, _, *name = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        yield Mapping(start, end, permissions, name[0].rstrip() if name else "[anonymous]")


def _words(octets: bytes) -> tuple[bytes, ...]:
    return tuple(octets.rstrip(b"\0").split(b"\0")) if octets.strip(b"\0") else ()
