"""Checks: what a process can see of the machine: namespaces, network, root directory.

Run by ``titus-py audit``. To see what is in a network namespace, a thread of the audit
enters it, and ends there.
"""

import fcntl
import os
import socket
import struct

from keyd.linux.mounts import mounts, uncovered
from titus_py.audit.finding import Check, Seen, broken, holds, not_available
from titus_py.audit.instance import Role
from titus_py.audit.mounts import in_sight
from titus_py.audit.network import in_network_of
from titus_py.audit.observation import Observation, Scene

__all__ = ["CHECKS"]

_SIOCGIFFLAGS = 0x8913
_IFF_UP = 1


def _namespaces(kinds: tuple[str, ...], *roles: Role) -> "Check":
    def look(seen: Observation, scene: Scene) -> Seen:
        shared = []
        for kind in kinds:
            namespace = seen.namespaces[kind]
            others = scene.inhabitants.get(namespace, set()) - {seen.pid}
            if others:
                examples = ", ".join(str(pid) for pid in sorted(others)[:3])
                shared.append(f"{namespace} is also that of {len(others)} more, as {examples}")
        if shared:
            return broken("; ".join(shared))
        return holds(f"{', '.join(kinds)}: nobody else is in them")

    return Check(
        "namespaces",
        frozenset(roles),
        f"namespaces of its own: {', '.join(kinds)}",
        "/proc/PID/ns of all processes",
        look,
    )


#: These share a network namespace: workers inherit it from their fork server.
_FORKED = frozenset({Role.FORK_SERVER, Role.WORKER})


def _network(seen: Observation, scene: Scene) -> Seen:
    own = seen.namespaces["net"]
    if seen.apart:
        return broken(_words_for(seen.apart))
    allowed = _FORKED if seen.process.role in _FORKED else {seen.process.role}
    members = {other.process.role for other in scene.observations if other.namespaces["net"] == own}
    if strangers := members - allowed:
        return broken(f"{own} is also the {', '.join(sorted(strangers))}'s")
    ours = {other.pid for other in scene.of(*allowed)}
    everybody = {other.pid for other in scene.observations}
    if outside := scene.inhabitants.get(own, set()) - ours - _descendants(scene, everybody):
        return broken(f"{own} is also that of process {', '.join(map(str, sorted(outside)))}")
    interfaces = _interfaces(seen.pid)
    if (
        interfaces == ["lo, up"]
        and seen.process.role is Role.KEYD
        and not scene.target.started(seen.process)
    ):
        # systemd's PrivateNetwork= sets lo up. It leads only to processes in the same namespace.
        return holds(f"{own}: nothing but lo, and nobody else's")
    if interfaces != ["lo, down"]:
        return broken(f"{own} has: {'; '.join(interfaces)}")
    return holds(f"{own}: nothing but lo, and that is down")


def _words_for(apart: tuple[int, ...]) -> str:
    numbers = ", ".join(map(str, apart))
    return f"its thread {numbers} has a root, a working directory or a namespace of its own"


def _descendants(scene: Scene, of: set[int]) -> set[int]:
    """The processes that the instance has started since it was looked at."""
    return {process.pid for process in scene.everyone if process.ppid in of}


def _interfaces(pid: int) -> list[str]:
    """The interfaces of the process's network namespace, and whether they are up."""
    found: list[str] = []

    def look() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            for _, name in socket.if_nameindex():
                request = struct.pack("16sH22x", name.encode(), 0)
                answer = fcntl.ioctl(control, _SIOCGIFFLAGS, request)
                up = struct.unpack_from("16sH", answer)[1] & _IFF_UP
                found.append(f"{name}, {'up' if up else 'down'}")

    in_network_of(pid, look)
    return found


def _root(seen: Observation, scene: Scene) -> Seen:
    chroot = str(scene.target.configuration.worker.chroot)
    own = seen.process.role is not Role.KEYD or scene.target.started(seen.process)
    if seen.root == "/" and not own:
        return _root_of_a_unit(seen, scene)
    if seen.root == "/" or (own and seen.root != os.path.realpath(chroot)):
        return broken(f"its root is {seen.root}")
    if seen.cwd != seen.root:
        # From there, every directory of the machine can be reached (chroot(2)).
        return broken(f"its working directory is {seen.cwd}, outside of its root, {seen.root}")
    if seen.apart:
        return broken(_words_for(seen.apart))
    if seen.root_content:
        return broken(f"{seen.root} holds {', '.join(seen.root_content[:5])}")
    text = f"{seen.root}: empty, uid {seen.root_owner}'s, mode {seen.root_mode:04o}"
    owns = seen.root_owner == seen.process.uid and seen.process.role is not Role.FORK_SERVER
    if owns or seen.root_mode & 0o022:
        return broken(text)
    return holds(text)


def _root_of_a_unit(seen: Observation, scene: Scene) -> Seen:
    """With systemd's RootDirectory=, the root is "/" of a mount namespace that only keyd is in."""
    namespace = seen.namespaces["mnt"]
    if others := scene.inhabitants.get(namespace, set()) - {seen.pid}:
        return broken(f"{namespace} is also that of process {min(others)}")
    try:
        visible = uncovered(mounts(seen.pid))
        wrong = in_sight(seen.pid, visible)
    except (FileNotFoundError, ProcessLookupError):
        return not_available("it ended while it was looked at")
    if wrong:
        return broken("; ".join(wrong[:10]))
    return holds(
        f"a root of its own, which systemd made: {len(visible)} mounts, and of the machine's "
        "nothing but programs and the kernel's own, read-only"
    )


CHECKS = (
    _namespaces(("pid", "ipc", "uts"), Role.WORKER),
    _namespaces(("ipc", "uts"), Role.KEYD, Role.METRICS, Role.CONNECTOR),
    Check(
        "network",
        _FORKED,
        "an empty network namespace, the fork server's and its workers' own",
        "/proc/PID/ns/net of all processes; entered, and its interfaces listed",
        _network,
    ),
    Check(
        "network",
        frozenset({Role.KEYD, Role.METRICS, Role.CONNECTOR}),
        "an empty network namespace, its own",
        "/proc/PID/ns/net of all processes; entered, and its interfaces listed",
        _network,
    ),
    Check(
        "root",
        frozenset({Role.FORK_SERVER}),
        "an empty root directory, which only root can write, and nothing outside of it",
        "/proc/PID/root: where, what is in it, its owner and mode; /proc/PID/cwd",
        _root,
    ),
    Check(
        "root",
        frozenset({Role.WORKER, Role.KEYD, Role.METRICS}),
        "an empty root directory that it cannot write, and nothing outside of it",
        "/proc/PID/root: where, what is in it, its owner and mode; /proc/PID/cwd",
        _root,
    ),
)
