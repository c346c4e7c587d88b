"""A worker's confinement, from root to next to nothing, in two steps.

The fork server puts on itself, once and for good, what is the same for all workers
(``confine_fork_server``). They inherit it. Each worker does the rest as soon as it is
forked (``worker_calls``), before any Python and before it has a client. If any step fails,
that process does not serve.
"""

import fcntl
import os
import signal
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from keyd.linux import landlock, limits, prctl, seccomp
from keyd.linux.calls import address
from keyd.linux.credentials import (
    controllable_speculation,
    enter_empty_root,
    forbid_regaining,
    keep_capabilities,
    limit,
    stop_speculation,
)
from keyd.linux.memory import MAP_FIXED, MAP_SHARED, PAGE_OCTETS, PROT_READ, PROT_WRITE
from keyd.linux.namespaces import leave_namespaces
from keyd.linux.process import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWPID, CLONE_NEWUTS, Call
from keyd.linux.title import PR_SET_NAME
from titus_py.between.hand_over import KEYD_FD, PARENT_FD
from titus_py.fork_server import out_of_memory

__all__ = [
    "CONFINING_CAPABILITIES",
    "FORK_SERVER_CAPABILITIES",
    "LANDLOCK",
    "MAX_ORDERS",
    "MEMORY_OCTETS",
    "PARENT_CAPABILITIES",
    "RULESET_FD",
    "SCORE_FD",
    "SPECULATION",
    "TRANSPARENT_CAPABILITIES",
    "WORKER_NAMESPACES",
    "Given",
    "confine_fork_server",
    "keep_only",
    "missing_features",
    "parting_calls",
    "worker_calls",
]

#: The namespaces that a worker is forked into. No other process is in them. The worker is
#: process 1 there: when it ends, the kernel kills whatever processes it left behind.
WORKER_NAMESPACES = CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS

#: What the parent keeps.
PARENT_CAPABILITIES = {
    prctl.CAP_KILL: "ending a worker, which has another uid",
}

#: What the parent keeps as well where backends see their clients' addresses, and the supervisor
#: where it was started with such a configuration, or with a transparent listener. CAP_NET_ADMIN
#: would do, too (ip(7)): it could change interfaces, routes and the firewall, and for good.
TRANSPARENT_CAPABILITIES = {
    prctl.CAP_NET_RAW: "transparent sockets (source_address, transparent)",
}

#: What the fork server keeps; a worker loses it with uid 0.
FORK_SERVER_CAPABILITIES = {
    prctl.CAP_SYS_ADMIN: "clone(2) into namespaces",
    prctl.CAP_SETUID: "a uid for each worker",
    prctl.CAP_SETGID: "a gid for each worker",
}

#: Capabilities that confining takes. The supervisor keeps these for the other processes, which
#: drop them.
CONFINING_CAPABILITIES = {
    prctl.CAP_SYS_CHROOT: "chroot(2) into the empty directory",
    prctl.CAP_SETPCAP: "emptying bounding sets, locking securebits",
}

#: The descriptors of the fork server's Landlock ruleset, and of what the kernel goes by when memory
#: runs out (``out_of_memory``).
RULESET_FD, SCORE_FD = 4, 5
#: A worker's: the standard streams, the sockets to the parent, keyd, the client and the backend,
#: and one to spare.
_MAX_DESCRIPTORS = 8
#: How many orders the fork server is given before it has answered the first of them.
MAX_ORDERS = 16
#: The fork server's: two that come with each order, each worker's pidfd, and its own. It has no
#: more than one order's open, but those that are under way count, too, where it is root of no more
#: than a user namespace (unix(7), ETOOMANYREFS).
_FORK_SERVER_DESCRIPTORS = 3 * MAX_ORDERS + _MAX_DESCRIPTORS
#: Address space beyond what the fork server had when it was confined, in octets: a
#: connection takes about one MiB. With page tables it can be three times as much memory, and what
#: was mapped before can be filled besides: together less than the threat model's 200 MiB.
MEMORY_OCTETS = 60 * 1024 * 1024

_LAST_DESCRIPTOR = 0xFFFF_FFFF
# prctl(2)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_NAME = b"titus-worker\0"
#: Each a struct rlimit: soft and hard.
_NONE = struct.pack("=QQ", 0, 0)
_FEW = struct.pack("=QQ", _MAX_DESCRIPTORS, _MAX_DESCRIPTORS)

#: Features that not every kernel has.
LANDLOCK = "landlock"
SPECULATION = "speculation"


class Given(NamedTuple):
    """What an order gives a worker: its uid, the descriptors of its report and of its socket."""

    uid: int
    report: int
    parent: int


def confine_fork_server(chroot: str, parent: int) -> None:
    """Put on everything that workers can inherit, in this order.

    ``parent`` is the socket to keep. Whatever has to be loaded or opened by a path must be so
    before. Only the privileges for making processes of other users are left.
    """
    memory = _memory_in_use() + MEMORY_OCTETS
    score = os.open(out_of_memory.FILE, os.O_RDWR | os.O_CLOEXEC)
    ruleset = landlock.make_ruleset() if landlock.version() else -1
    leave_namespaces(CLONE_NEWNET)
    enter_empty_root(chroot)
    os.setgroups([])
    stop_speculation(controllable_speculation())
    # These need CAP_SETPCAP, which the last of them drops.
    keep_capabilities([*FORK_SERVER_CAPABILITIES, prctl.CAP_SETPCAP])
    forbid_regaining([*FORK_SERVER_CAPABILITIES, prctl.CAP_SETPCAP])
    keep_capabilities(FORK_SERVER_CAPABILITIES)
    prctl.set_no_new_privs(1)
    if ruleset >= 0:
        landlock.restrict_self(ruleset)
    keep_only({PARENT_FD: parent, RULESET_FD: ruleset, SCORE_FD: score})
    limit(
        {
            limits.RLIMIT_AS: memory,
            limits.RLIMIT_NOFILE: _FORK_SERVER_DESCRIPTORS,
            limits.RLIMIT_FSIZE: 0,
            limits.RLIMIT_CORE: 0,
            limits.RLIMIT_MEMLOCK: 0,
            limits.RLIMIT_MSGQUEUE: 0,
            limits.RLIMIT_SIGPENDING: 0,
            limits.RLIMIT_NICE: 0,
            limits.RLIMIT_RTPRIO: 0,
        }
    )


def worker_calls(worker_filter: seccomp.Program, page: int, given: Given) -> list[Call]:
    """The rest of the confinement: the system calls that a worker makes before anything else.

    Its namespaces are new since the fork. ``page`` is the address of a page that the fork
    server has reserved: the worker's report is mapped there.
    """
    # Each worker has a Landlock domain of its own, within the fork server's. Landlock keeps
    # processes from signalling and tracing each other between domains, but not within one.
    own_domain = [Call("landlock_restrict_self", (RULESET_FD, 0))] if landlock.version() else []
    writable, shared = PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED
    uid = given.uid
    return [
        Call("mmap", (page, PAGE_OCTETS, writable, shared, given.report, 0)),
        *own_domain,
        # Descriptor 0 is /dev/null. Whatever the C library has to say on standard error must
        # not reach a client, nor fill a log.
        Call("dup3", (0, 2, 0)),
        Call("dup3", (given.parent, PARENT_FD, os.O_CLOEXEC)),
        Call("close_range", (PARENT_FD + 1, _LAST_DESCRIPTOR, 0)),
        Call("prlimit64", (0, limits.RLIMIT_NOFILE, address(_FEW), 0)),
        Call("prlimit64", (0, limits.RLIMIT_NPROC, address(_NONE), 0)),
        Call("setgroups", (0, 0)),
        Call("setresgid", (uid, uid, uid)),
        # Leaving uid 0 drops all capabilities (capabilities(7), "Effect of user ID changes").
        Call("setresuid", (uid, uid, uid)),
        # These two come after the change of uid, which would undo them.
        Call("prctl", (_PR_SET_DUMPABLE, 0)),
        Call("prctl", (_PR_SET_PDEATHSIG, signal.SIGKILL)),
        Call("prctl", (PR_SET_NAME, address(_NAME))),
        Call("seccomp", (seccomp.SET_MODE_FILTER, 0, worker_filter.address)),
    ]


def parting_calls() -> list[Call]:
    """After the handshake: end the channel to keyd, for both ends.

    The socket stays open at its number. Nothing else gets that number, so whatever the provider
    may still want to say to keyd reaches nobody.
    """
    return [Call("shutdown", (KEYD_FD, socket.SHUT_RDWR))]


def keep_only(kept: Mapping[int, int]) -> None:
    """Keep the standard streams, and these descriptors (-1: none) at these places.

    Everything else is closed.
    """
    # Move them out of each other's way first.
    moved = {
        place: fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, max(kept) + 1)
        for place, descriptor in kept.items()
        if descriptor >= 0
    }
    os.closerange(PARENT_FD, max(kept) + 1)
    for place, descriptor in moved.items():
        os.dup2(descriptor, place, inheritable=False)
    os.closerange(max(kept) + 1, 1 << 20)


def _memory_in_use() -> int:
    """Address space, in octets."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    return pages * PAGE_OCTETS


def missing_features(landlock_version: int, speculation: Sequence[int]) -> list[str]:
    """The features that this kernel lacks, of those that not every kernel has."""
    missing = []
    if not landlock_version:
        missing.append(LANDLOCK)
    if len(speculation) < 2:
        missing.append(SPECULATION)
    return missing
