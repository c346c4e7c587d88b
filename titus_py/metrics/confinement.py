"""What the metrics server gives up. Run by it, as root, before it accepts a client."""

import os
import resource
import signal

import prctl

from keyd.linux import landlock, seccomp
from keyd.linux.credentials import (
    become,
    controllable_speculation,
    enter_empty_root,
    forbid_core_dumps,
    forbid_regaining,
    hide_memory,
    keep_capabilities,
    limit,
    stop_speculation,
)
from keyd.linux.namespaces import leave_namespaces
from keyd.linux.process import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWUTS

__all__ = ["LIMITS", "confine"]

#: Hard limits. Of memory, so much that 16 slow clients can each have a text of some MiB.
LIMITS = {
    resource.RLIMIT_AS: 512 * 1024 * 1024,
    resource.RLIMIT_NPROC: 0,
    resource.RLIMIT_NOFILE: 32,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_MEMLOCK: 0,
    resource.RLIMIT_MSGQUEUE: 0,
    resource.RLIMIT_NICE: 0,
    resource.RLIMIT_RTPRIO: 0,
}


def confine(uid: int, chroot: str, program: seccomp.Program) -> None:
    """Give up everything but what is open. Raises OSError."""
    forbid_core_dumps()
    stop_speculation(controllable_speculation())
    nowhere = os.open(os.devnull, os.O_WRONLY)
    ruleset = landlock.make_ruleset() if landlock.version() else None
    # The listening socket stays where it was made.
    leave_namespaces(CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    last_needed = {prctl.CAP_SYS_CHROOT, prctl.CAP_SETUID, prctl.CAP_SETGID, prctl.CAP_SETPCAP}
    keep_capabilities(last_needed)
    enter_empty_root(chroot)
    forbid_regaining(last_needed)
    become(uid, uid)
    # After become(): a change of uid resets both.
    hide_memory()
    prctl.set_pdeathsig(signal.SIGKILL)
    limit(LIMITS)
    if ruleset is not None:
        landlock.restrict_self(ruleset)
        os.close(ruleset)
    # Standard error is the instance's log, which clients must not reach. Until here, it has the
    # reason if something fails.
    os.dup2(nowhere, 2)
    os.close(nowhere)
    seccomp.install(program)
