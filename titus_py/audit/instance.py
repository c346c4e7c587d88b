"""A running instance seen from outside: its processes, and what /proc says of them.

Run as root, by the audit, the demo and the tests. It trusts the kernel. A process's own
command line only tells the supervisor's children from each other. Workers and the fork
server are known as children of the parent.
"""

import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import NamedTuple

from titus_py.audit.sockets import tcp_lines
from titus_py.configuration.address import IPAddress, canonical_ip

__all__ = [
    "Connection",
    "Process",
    "Role",
    "all_processes",
    "connections_to",
    "descriptors",
    "holders",
    "instance_processes",
    "is_parent",
    "namespaces",
    "status",
    "title",
]

_ESTABLISHED = "01"


class Role(StrEnum):
    """What a process is in its instance; ``OTHER`` is one that should not be there."""

    SUPERVISOR = "supervisor"
    PARENT = "parent"
    FORK_SERVER = "fork server"
    KEYD = "keyd"
    MODULE = "token's process"  #: keyd's, two for each token
    CONNECTOR = "upstreams' process"  #: keyd's, only where keys are other hosts'
    WORKER = "worker"
    RESOLVER = "resolver"  #: only where a backend has a name
    METRICS = "metrics"  #: only where metrics are served
    CHECK = "keyd check"  #: short-lived: checks keys and certificates
    OTHER = "other"


#: Processes of the supervisor by the program that they are before they have renamed themselves.
_UNPRIVILEGED = {
    Role.RESOLVER: b"titus_py.resolver.life",
    Role.METRICS: b"titus_py.metrics.life",
}
#: Processes of keyd by the command that they are before they have renamed themselves, and after.
_OF_KEYD = (
    (Role.MODULE, b"token", b"keyd: a token's process"),
    (Role.CONNECTOR, b"connect", b"keyd: connecting to upstreams"),
)


class Process(NamedTuple):
    """A process, as /proc has it.

    ``uid`` is the effective one. ``started`` (clock ticks since boot) tells processes apart
    that had the same pid one after the other.
    """

    pid: int
    ppid: int
    uid: int
    started: int
    role: Role = Role.OTHER


class Connection(NamedTuple):
    """An established TCP connection; ``inode`` is that of its local socket."""

    inode: int
    local: IPAddress
    remote: IPAddress


def all_processes() -> list[Process]:
    """Every process in sight but zombies, none with a role yet."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                process = _process(int(name))
            except (FileNotFoundError, ProcessLookupError):
                continue
            if process is not None:
                found.append(process)
    return found


def instance_processes(supervisor: int) -> list[Process]:
    """The supervisor and all its descendants, parents before their children.

    The list is empty if there is no process with this pid.
    """
    processes = all_processes()
    found = [process for process in processes if process.pid == supervisor]
    found = [process._replace(role=Role.SUPERVISOR) for process in found]
    children: dict[int, list[Process]] = {}
    for process in processes:
        children.setdefault(process.ppid, []).append(process)
    for above in found:
        below = children.get(above.pid, [])
        fork_server = _fork_server(above.pid, below) if above.role is Role.PARENT else None
        found += [
            process._replace(
                role=Role.FORK_SERVER if process is fork_server else _role(above.role, process.pid)
            )
            for process in below
        ]
    return found


def _fork_server(parent: int, children: Iterable[Process]) -> Process | None:
    """The child of a parent that runs as root, and in the parent's own pid namespace.

    A worker that has just been forked has the fork server's command line and runs as root,
    too, but is in a pid namespace of its own from the start. If there are several such
    children, something is wrong: the oldest is the fork server, and the others are workers
    that are not confined as they should be.
    """
    candidates = [
        process
        for process in children
        if process.uid == 0 and _depth(process.pid) == _depth(parent)
    ]
    return min(candidates, key=lambda process: process.started, default=None)


def _depth(pid: int) -> int:
    """How many pid namespaces a process is in, counted from ours (proc(5)); 0 if it is gone."""
    try:
        return len(status(pid)["NSpid"].split())
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _process(pid: int) -> Process | None:
    # A process's name is in both files, and is any octets but for a line feed.
    state, ppid, *fields = _short_file(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    if state in b"ZX":
        return None
    # One line of its status: this is asked for every process of the machine, many times.
    octets = _short_file(f"/proc/{pid}/status")
    uid = octets.partition(b"\nUid:")[2].split(maxsplit=2)[1]
    return Process(pid, int(ppid), int(uid), int(fields[17]))


def _short_file(path: str) -> bytes:
    """Of /proc, less than a page: pathlib takes longer than the kernel does."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 8192)
    finally:
        os.close(descriptor)


def _role(above: Role, pid: int) -> Role:
    if above is Role.PARENT:
        return Role.WORKER
    if above not in (Role.SUPERVISOR, Role.KEYD, Role.MODULE):
        return Role.OTHER
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return Role.OTHER
    if above is not Role.SUPERVISOR:
        for role, command, title_of_it in _OF_KEYD:
            if title_of_it in words or {b"keyd", command} <= set(words):
                return role
        return Role.OTHER
    if is_parent(words):
        return Role.PARENT
    for role, module in _UNPRIVILEGED.items():
        if module in words or title(role) in words:
            return role
    if b"keyd" in words:
        return Role.CHECK if b"check" in words else Role.KEYD
    return Role.OTHER


def is_parent(words: Sequence[bytes]) -> bool:
    """Whether that is the command line of a parent, before or after it has renamed itself."""
    return b"titus_py.parent.life" in words or title(Role.PARENT) in words


def title(role: Role) -> bytes:
    """The command line of a process with this role, or the beginning of it."""
    return (role if role is Role.KEYD else f"titus-py: {role}").encode()


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status, by field. Raises OSError if the process is gone."""
    # The name may have what str.splitlines takes for the end of a line.
    lines = Path(f"/proc/{pid}/status").read_bytes().decode(errors="replace").split("\n")[:-1]
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def namespaces(pid: int | str) -> dict[str, str]:
    """The process's own namespaces by their kinds, as in ``{"net": "net:[4026531840]"}``.

    Raises OSError if the process is gone.
    """
    return {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in _kinds_of_namespaces()}


@cache
def _kinds_of_namespaces() -> tuple[str, ...]:
    """Those that this kernel has."""
    names = sorted(os.listdir("/proc/self/ns"))
    return tuple(name for name in names if not name.endswith("_for_children"))


def descriptors(pid: int) -> dict[int, str]:
    """What each open descriptor is, in the kernel's words (``socket:[4711]``, ``/dev/null``).

    Raises OSError if the process is gone.
    """
    directory = f"/proc/{pid}/fd"
    found = {}
    for number in os.listdir(directory):
        try:
            found[int(number)] = os.readlink(f"{directory}/{number}")
        except FileNotFoundError:
            continue
    return found


def connections_to(port: int, processes: Iterable[Process]) -> dict[Process, Connection]:
    """The processes that hold a TCP connection to this local port, each with its connection.

    Only connections of the caller's network namespace are found. A socket belongs to the
    namespace that it was made in, whichever namespace the process that holds it is in.
    """
    connections = {found.inode: found for found in _connections(port)}
    return {
        process: connections[inode] for process, inode in holders(connections, processes).items()
    }


def holders(inodes: Iterable[int], processes: Iterable[Process]) -> dict[Process, int]:
    """The processes that hold one of these sockets, each with the last that it holds."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found = {}
    for process in processes:
        try:
            held = descriptors(process.pid).values()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for description in held:
            if description in wanted:
                found[process] = wanted[description]
    return found


def _connections(port: int) -> Iterator[Connection]:
    for local, remote, state, inode in tcp_lines():
        if state == _ESTABLISHED and int(local.partition(":")[2], 16) == port:
            yield Connection(inode, _address(local), _address(remote))


def _address(text: str) -> IPAddress:
    """proc_net_tcp(5): the address as 32-bit words in the machine's byte order."""
    host, _, port = text.partition(":")
    words = bytes.fromhex(host)
    packed = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    # The name of the interface is not there, so link-local addresses stay as they are.
    try:
        host = canonical_ip(socket.inet_ntop(family, packed))
    except ValueError:
        host = socket.inet_ntop(family, packed)
    return IPAddress(host, int(port, 16))
