"""A worker's confinement, from root to next to nothing.

``confine`` is run by the worker as soon as it is forked, before it has a client. Any
step that fails raises, and then the worker does not serve. What the steps need is
made once, by the supervisor and the parent, and inherited.
"""

import os
import resource
import signal
from collections.abc import Sequence
from typing import NamedTuple

import prctl

from keyd.linux import landlock, seccomp
from keyd.linux.credentials import (
    become,
    enter_empty_root,
    forbid_regaining,
    hide_memory,
    limit,
    stop_speculation,
)
from keyd.linux.namespaces import enter_network_namespace
from keyd.linux.process import CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWUTS

__all__ = [
    "KEYD_FD",
    "LANDLOCK",
    "MEMORY_OCTETS",
    "PARENT_CAPABILITIES",
    "PARENT_FD",
    "SPECULATION",
    "WORKER_NAMESPACES",
    "Confinement",
    "confine",
    "keep_only",
    "memory_limit",
    "missing_features",
    "narrow",
]

#: The namespaces that a worker is forked into: nobody else is in them. When the worker
#: ends, being process 1 of its own, the kernel ends whatever it may have left behind.
WORKER_NAMESPACES = CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS

#: What the parent keeps, so that its workers can give it up.
PARENT_CAPABILITIES = {
    prctl.CAP_SYS_ADMIN: "clone(2) into namespaces, setns(2) into the empty network",
    prctl.CAP_SYS_CHROOT: "chroot(2) into the empty directory",
    prctl.CAP_SETUID: "a uid for each worker",
    prctl.CAP_SETGID: "a gid for each worker, and no other groups",
    prctl.CAP_SETPCAP: "emptying the bounding set, locking securebits",
    prctl.CAP_KILL: "ending a worker, which has another uid",
}

#: Where a worker finds what it holds. 0 to 2 are /dev/null: whatever the C library has
#: to say on standard error must not reach a client.
PARENT_FD = 3
#: The first number that is free while the pair that brought it (``hand_over``) is open.
KEYD_FD = 5
#: Those, keyd's channel, the client and the backend, and one to spare.
_MAX_DESCRIPTORS = 8
#: Address space beyond what the parent had when it forked, in octets: a connection takes
#: about one MiB.
MEMORY_OCTETS = 64 * 1024 * 1024

#: Features that not every kernel has.
LANDLOCK = "landlock"
SPECULATION = "speculation"


class Confinement(NamedTuple):
    """What a worker's confinement needs, beside a uid. Descriptors are the parent's."""

    chroot: str
    #: An empty network namespace, shared by all workers.
    network: int
    #: A ruleset that grants nothing; None where the kernel has no Landlock.
    landlock: int | None
    #: The kinds of speculation that can be turned off here.
    speculation: tuple[int, ...]
    #: RLIMIT_AS, in octets.
    memory: int
    #: The capabilities that the parent has left in its bounding set.
    bounding: tuple[int, ...]
    #: Filters, as BPF: until the handshake is done, and from then on.
    handshake_filter: bytes
    established_filter: bytes


def memory_limit() -> int:
    """How much address space a worker forked from this process may have, in octets."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    return pages * resource.getpagesize() + MEMORY_OCTETS


def confine(confinement: Confinement, uid: int, null: int, parent: int) -> None:
    """Everything, in this order; pid, ipc and uts namespaces are new since the fork.

    ``null`` and ``parent`` are the descriptors to keep.
    """
    enter_network_namespace(confinement.network)
    enter_empty_root(confinement.chroot)
    _limit_resources(confinement.memory)
    stop_speculation(confinement.speculation)
    forbid_regaining(confinement.bounding)
    become(uid, uid)
    # Both after become(): a change of uid undoes them.
    hide_memory()
    prctl.set_pdeathsig(signal.SIGKILL)
    if confinement.landlock is not None:
        landlock.restrict_self(confinement.landlock)
    keep_only(null, parent)
    seccomp.install(confinement.handshake_filter)


def narrow(confinement: Confinement) -> None:
    """With the handshake done: no keyd any more, and the calls that it needed gone."""
    os.close(KEYD_FD)
    seccomp.install(confinement.established_filter)


def keep_only(null: int, parent: int) -> None:
    """Move these to their places and close everything else."""
    for place in (0, 1, 2):
        os.dup2(null, place)
    os.dup2(parent, PARENT_FD, inheritable=False)
    os.closerange(PARENT_FD + 1, 1 << 20)


def _limit_resources(memory: int) -> None:
    limit(
        {
            resource.RLIMIT_AS: memory,
            resource.RLIMIT_NOFILE: _MAX_DESCRIPTORS,
            resource.RLIMIT_NPROC: 0,
            resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
            resource.RLIMIT_SIGPENDING: 0,
            resource.RLIMIT_NICE: 0,
            resource.RLIMIT_RTPRIO: 0,
        }
    )


def missing_features(landlock_version: int, speculation: Sequence[int]) -> list[str]:
    """Which of the features that a kernel may lack this one does."""
    missing = []
    if not landlock_version:
        missing.append(LANDLOCK)
    if len(speculation) < 2:
        missing.append(SPECULATION)
    return missing
