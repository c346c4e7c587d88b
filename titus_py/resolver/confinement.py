"""What the resolver gives up. Run by the resolver, as root, before it looks up a name."""

import os
import resource

import prctl

from keyd.linux import landlock, seccomp
from keyd.linux.credentials import (
    become,
    controllable_speculation,
    forbid_core_dumps,
    forbid_regaining,
    hide_memory,
    keep_capabilities,
    limit,
    stop_speculation,
)

__all__ = ["LIMITS", "READABLE", "confine"]

#: What may be read: the resolver's settings and hosts(5), which may be links into /run, and the
#: modules of nsswitch.conf(5). Whole directories, since a file that is replaced is another file.
#: What in there is not for everybody, such as keys, the uid may not read.
READABLE = ("/etc", "/run", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
_GIGABYTE = 1 << 30
#: Hard limits. Threads count as processes, and each gets memory of its own from malloc(3).
LIMITS = {
    resource.RLIMIT_AS: 4 * _GIGABYTE,
    resource.RLIMIT_NPROC: 64,
    resource.RLIMIT_NOFILE: 256,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_MEMLOCK: 0,
    resource.RLIMIT_MSGQUEUE: 0,
    resource.RLIMIT_NICE: 0,
    resource.RLIMIT_RTPRIO: 0,
}


def confine(uid: int, program: seccomp.Program) -> None:
    """Give up everything but reading a few directories, and the network. Raises OSError."""
    os.chdir("/")
    forbid_core_dumps()
    stop_speculation(controllable_speculation())
    nowhere = os.open(os.devnull, os.O_WRONLY)
    ruleset = _reading_only() if landlock.version() else None
    last_needed = {prctl.CAP_SETUID, prctl.CAP_SETGID, prctl.CAP_SETPCAP}
    keep_capabilities(last_needed)
    forbid_regaining(last_needed)
    become(uid, uid)
    # After become(): a change of uid resets the flag.
    hide_memory()
    limit(LIMITS)
    if ruleset is not None:
        landlock.restrict_self(ruleset)
        os.close(ruleset)
    # Standard error is the instance's log, in which a resolver that was taken over could write what
    # it likes. Until here, it has the reason if something fails.
    os.dup2(nowhere, 2)
    os.close(nowhere)
    seccomp.install(program)


def _reading_only() -> int:
    ruleset = landlock.make_ruleset(network=False)
    # On some systems these are links to elsewhere.
    settings = map(os.path.realpath, ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf"))
    for directory in {*READABLE, *map(os.path.dirname, settings)}:
        try:
            landlock.allow_reading(ruleset, directory)
        except FileNotFoundError:
            continue
    return ruleset
