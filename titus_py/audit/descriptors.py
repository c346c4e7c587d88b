"""Checks: what a process holds open, each descriptor by a name.

Run by ``titus-py audit``. A unix socket is named after the process of the instance that
holds its other end (sock_diag(7)).
"""

import os
import re
import socket
from collections import Counter
from collections.abc import Iterable

from keyd.status_page import NAME as STATUS_PAGE
from titus_py.audit.finding import Check, Seen, broken, holds, not_available
from titus_py.audit.instance import Role, descriptors
from titus_py.audit.observation import Observation, Scene, Stage
from titus_py.between.hand_over import PARENT_FD
from titus_py.configuration.upstream_table import MOST_UPSTREAMS
from titus_py.resolver.confinement import READABLE

__all__ = ["CHECKS", "names"]

_NULL = "/dev/null"
_CLIENT, _BACKEND, _LISTENER = "client", "backend", "listening socket"
_CLOSED = "socket with no other end"
_ERRORS = "standard error, the supervisor's"
_OWN_ERRORS = "standard error"
_TO_PARENT = "socket to the parent"
_UPSTREAM = "connection to an upstream"
_TO_MANAGER = "socket to the service manager"
_RULESET = "Landlock ruleset"
_NAME_SERVER, _SETTINGS = "socket to a name server", "file that it reads settings from"
_SCORE = "score for when memory runs out"
_BORROWER = "where it lends keys, and hosts that it lends them to"
_READER, _TEXT = "who asks for the metrics", "text of the metrics"
_PIDFD, _REPORT, _WORKERS = "pidfd", "worker's report page", "new worker's socket"
_KINDS = {
    r"/dev/null": _NULL,
    r"anon_inode:\[eventpoll\]": "epoll",
    r"anon_inode:\[pidfd\]|pidfd:\[\d+\]": _PIDFD,
    r"/memfd:report \(deleted\)": _REPORT,
    r"/memfd:metrics \(deleted\)": _TEXT,
    r"anon_inode:\[landlock-ruleset\]": _RULESET,
    r"/proc/\d+/oom_score_adj": _SCORE,
}

#: What a process may hold, and how many of each (None: any number).
_Allowed = dict[str, int | None]
_SPARE: _Allowed = {_NULL: 3, _TO_PARENT: 1}
_HANDSHAKE: _Allowed = {**_SPARE, _CLIENT: 1, "socket to keyd": 1, _CLOSED: 1}
#: The channel to keyd is at an end, and keeps its number.
_ESTABLISHED: _Allowed = {**_SPARE, _CLIENT: 1, _BACKEND: 1, _CLOSED: 1}
_KEYD: _Allowed = {
    _NULL: 3,
    _OWN_ERRORS: 2,
    # The second one is for streams of hosts that it lends keys to.
    "epoll": 2,
    _TO_PARENT: None,
    "socket to the supervisor": 1,
    "socket to worker": None,
    "socket to the token's process": None,
    "socket to the upstreams' process": 1,
    # Each connection by two descriptors.
    _UPSTREAM: 2 * MOST_UPSTREAMS,
    _BORROWER: None,
    _CLOSED: None,
    # For a service with a watchdog (sd_notify(3)).
    _TO_MANAGER: 1,
    # Of a service: what `keyd status` reads.
    f"/memfd:{STATUS_PAGE} (deleted)": 1,
}
_FORK_SERVER: _Allowed = {
    _NULL: 2,
    _ERRORS: 1,
    _TO_PARENT: 1,
    _RULESET: 1,
    _SCORE: 1,
    # Held for a moment: they come with an order, or go back with the answer.
    _WORKERS: None,
    _REPORT: None,
    _PIDFD: None,
}
_PARENT: _Allowed = {
    _NULL: 2,
    _ERRORS: 1,
    "epoll": 1,
    _PIDFD: None,
    _REPORT: None,
    _LISTENER: None,
    "socket to the supervisor": 2,
    "socket to the fork server": 1,
    "socket to worker": None,
    "socket to keyd": None,
    # On their way to a worker.
    _CLIENT: None,
    _BACKEND: None,
    _CLOSED: None,
}


_RESOLVER: _Allowed = {
    _NULL: 3,
    "socket to the supervisor": 1,
    # While it looks something up.
    _NAME_SERVER: None,
    _SETTINGS: None,
}
_METRICS: _Allowed = {
    _NULL: 3,
    "epoll": 1,
    "socket to the supervisor": 1,
    _LISTENER: 1,
    _READER: None,
    # While it reads it.
    _TEXT: 1,
}


def names(seen: Observation, scene: Scene) -> dict[int, str]:
    """What each of a process's descriptors is: in our words, or else in the kernel's."""
    return {number: _name(seen, scene, number) for number in sorted(seen.descriptors)}


def _name(seen: Observation, scene: Scene, number: int) -> str:
    what = seen.descriptors[number]
    for pattern, name in _KINDS.items():
        if re.fullmatch(pattern, what):
            return name
    if (
        number in (1, 2)
        and seen.process.role is Role.KEYD
        and not scene.target.started(seen.process)
    ):
        return _OWN_ERRORS
    if number == 2 and seen.process.role is not Role.WORKER:
        errors = {other.descriptors.get(2) for other in scene.of(Role.SUPERVISOR)}
        if what in errors:
            return _ERRORS
    inode = seen.sockets.get(number)
    resolves = seen.process.role is Role.RESOLVER
    if inode is None:
        return _SETTINGS if resolves and what.startswith(READABLE) else what
    if _leads_to_manager(seen, scene, inode):
        return _TO_MANAGER
    name = _socket_name(scene, inode) or what
    lends = seen.process.role is Role.KEYD and scene.target.configuration.keyd.lend is not None
    if lends and name in (_BACKEND, _LISTENER):
        return _BORROWER
    if resolves and name in (what, _BACKEND):
        return _NAME_SERVER
    if seen.process.role is Role.KEYD and name == _BACKEND:
        return _UPSTREAM
    if seen.process.role is Role.METRICS and name in (_BACKEND, _CLIENT):
        # The listening socket is the supervisor's as well, no reader's is.
        holders = {other.process.role for other in scene.holders.get(inode, ())}
        return _LISTENER if Role.SUPERVISOR in holders else _READER
    if seen.process.role is Role.FORK_SERVER and number != PARENT_FD and name == _TO_PARENT:
        return _WORKERS
    return name


def _socket_name(scene: Scene, inode: int) -> str:
    tcp = scene.tcp(inode)
    if tcp is not None:
        if tcp.listening:
            return _LISTENER
        return _CLIENT if tcp.local in scene.listening else _BACKEND
    unix = scene.unix(inode)
    if unix is None:
        return ""
    if unix.kind == socket.SOCK_STREAM:
        if unix.listening:
            return _LISTENER
        return _CLIENT if unix.local in scene.listening else _BACKEND
    if not unix.peer:
        return _CLOSED
    holders = {
        Role.WORKER if _passes_on(other, unix.peer) else other.process.role
        for other in scene.holders.get(unix.peer, [])
    }
    # A process that was just forked holds the descriptors of the process that forked it, until it
    # has closed them. That other process is earlier in this order.
    of_keyd = Role.KEYD, Role.MODULE, Role.CONNECTOR
    for role in (Role.SUPERVISOR, Role.PARENT, Role.FORK_SERVER, *of_keyd, Role.WORKER):
        if role in holders:
            return f"socket to {'' if role is Role.WORKER else 'the '}{role}".replace(
                "the keyd", "keyd"
            )
    return _CLOSED


def _leads_to_manager(seen: Observation, scene: Scene, inode: int) -> bool:
    """Whether this is the datagram socket of a keyd that is a service to what started it."""
    if seen.process.role is not Role.KEYD or scene.target.started(seen.process):
        return False
    unix = scene.unix(inode)
    if unix is None or unix.kind != socket.SOCK_DGRAM:
        return False
    try:
        return f"socket:[{unix.peer}]" in descriptors(seen.process.ppid).values()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _passes_on(seen: Observation, inode: int) -> bool:
    """Whether that is a fork server that holds this socket for a new worker."""
    return seen.process.role is Role.FORK_SERVER and seen.sockets.get(PARENT_FD) != inode


def _held(seen: Observation, numbers: set[int]) -> set[int]:
    """Those of these descriptors whose files the process still holds.

    A socket that the kernel's tables do not have was closed before they were read, or is unlike
    those that a process of ours has. Where many clients come and go, each look finds another one.
    """
    try:
        now = set(descriptors(seen.pid).values()) if numbers else set()
    except (FileNotFoundError, ProcessLookupError):
        return numbers
    return {number for number in numbers if seen.descriptors[number] in now}


def _allowed(seen: Observation) -> _Allowed:
    match seen.process.role:
        case Role.PARENT:
            return _PARENT
        case Role.FORK_SERVER:
            return _FORK_SERVER
        case Role.KEYD:
            return _KEYD
        case Role.RESOLVER:
            return _RESOLVER
        case Role.METRICS:
            return _METRICS
        case _ if seen.stage == Stage.ESTABLISHED:
            return _ESTABLISHED
        case _ if seen.stage == Stage.HANDSHAKE:
            return _HANDSHAKE
        case _:
            return _SPARE


def _descriptors(seen: Observation, scene: Scene) -> Seen:
    if not scene.knows_peers:
        return not_available("this kernel does not tell the other ends of unix sockets (unix_diag)")
    named = names(seen, scene)
    allowed = _allowed(seen)
    counts = Counter(named.values())
    excess = {
        number: name
        for number, name in named.items()
        if name not in allowed or counts[name] > (allowed[name] or counts[name])
    }
    unnamed = {number for number, name in excess.items() if name.startswith("socket:")}
    for number in unnamed - _held(seen, unnamed):
        del excess[number]
    if excess:
        listed = ", ".join(f"{number}: {name}" for number, name in excess.items())
        return broken(f"more than it may hold: {listed}")
    return holds(_list(counts.items()))


def _list(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts)


def _supervisor(seen: Observation, scene: Scene) -> Seen:
    wrong = []
    for number, what in sorted(seen.descriptors.items()):
        try:
            stat = os.stat(f"/proc/{seen.pid}/fd/{number}")
        except FileNotFoundError:
            continue
        if path := scene.secret_files.get((stat.st_dev, stat.st_ino)):
            wrong.append(f"{number}: {path}")
        inode = seen.sockets.get(number, 0)
        found = scene.tcp(inode) or scene.unix(inode)
        if found is not None and found.local in scene.listening and not found.listening:
            wrong.append(f"{number}: a client, {what}")
    if wrong:
        return broken(", ".join(wrong))
    return holds(f"{len(seen.descriptors)} descriptors, none of them such")


CHECKS = (
    Check(
        "descriptors",
        frozenset({Role.WORKER}),
        "nothing open but /dev/null, its socket to the parent, its client, its backend, and "
        "until the handshake is done its channel to keyd",
        "/proc/PID/fd; sock_diag(7) and /proc/net/tcp for what they are",
        _descriptors,
    ),
    Check(
        "descriptors",
        frozenset({Role.KEYD}),
        "no file and no connection open: its sockets to parent, supervisor and workers",
        "/proc/PID/fd; sock_diag(7) and /proc/net/tcp for what they are",
        _descriptors,
    ),
    Check(
        "descriptors",
        frozenset({Role.FORK_SERVER}),
        "no file (but its own oom_score_adj) and no connection open: its socket to the parent, "
        "and what passes through it for a new worker",
        "/proc/PID/fd; sock_diag(7) and /proc/net/tcp for what they are",
        _descriptors,
    ),
    Check(
        "descriptors",
        frozenset({Role.PARENT}),
        "no file open: listening sockets, and what it shares with its fork server, its "
        "workers, keyd and the supervisor",
        "/proc/PID/fd; sock_diag(7) and /proc/net/tcp for what they are",
        _descriptors,
    ),
    Check(
        "descriptors",
        frozenset({Role.RESOLVER}),
        "nothing open but its socket to the supervisor; while it looks something up, also sockets "
        "to name servers and settings that it reads",
        "/proc/PID/fd; sock_diag(7) and /proc/net/tcp for what they are",
        _descriptors,
    ),
    Check(
        "descriptors",
        frozenset({Role.METRICS}),
        "nothing open but its socket to the supervisor, its listening socket, and who asks there",
        "/proc/PID/fd; sock_diag(7) and /proc/net/tcp for what they are",
        _descriptors,
    ),
    Check(
        "descriptors",
        frozenset({Role.SUPERVISOR}),
        "no client and no key file open",
        "/proc/PID/fd, each held against the key files' inodes and /proc/net/tcp",
        _supervisor,
    ),
)
