"""Checks that the machine, or the container, gives titus-py what it needs.

Run as root before anything is started, and by ``titus-py check``. Otherwise a process that lacks
a capability would end at the step that needs it, and be started again for ever. A user namespace
or a system call filter can forbid a step although the capability is there, so a child tries the
steps out.
"""

import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import prctl

from keyd.linux.credentials import lock_memory, permitted_capabilities
from keyd.linux.namespaces import leave_namespaces
from keyd.linux.process import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWPID, CLONE_NEWUTS
from titus_py.configuration import Configuration
from titus_py.fork_server.confinement import (
    CONFINING_CAPABILITIES,
    FORK_SERVER_CAPABILITIES,
    PARENT_CAPABILITIES,
    TRANSPARENT_CAPABILITIES,
)

__all__ = ["REQUIRED_CAPABILITIES", "SUPERVISOR_CAPABILITIES", "given_up", "lacking"]

#: Without any one of these, titus-py does not serve.
REQUIRED_CAPABILITIES = {
    **PARENT_CAPABILITIES,
    **FORK_SERVER_CAPABILITIES,
    **CONFINING_CAPABILITIES,
}

_GIVING_AWAY = {prctl.CAP_CHOWN: "socket_user (socket_group does without)"}
#: What the supervisor keeps, for itself or for its children, each with its reason.
SUPERVISOR_CAPABILITIES = {
    **REQUIRED_CAPABILITIES,
    prctl.CAP_DAC_OVERRIDE: "keyd reads keys, the parent connects to unix sockets, of any owner",
    prctl.CAP_IPC_LOCK: "keyd locks its memory",
    prctl.CAP_SYS_RESOURCE: "keyd may lock as much of it as it takes",
    prctl.CAP_NET_BIND_SERVICE: "listening addresses that a reload adds",
    **_GIVING_AWAY,
}

# Not whatever begins with CAP_: prctl calls the sets so, too (CAP_EFFECTIVE).
_NAMES = {
    getattr(prctl, name): name for name in (f"CAP_{one.upper()}" for one in prctl.ALL_CAP_NAMES)
}


def lacking(configuration: Configuration | None) -> list[str]:
    """What is missing, each with what it is for; empty if all is well.

    Without a configuration: what any configuration would need.
    """
    there = permitted_capabilities()
    required = REQUIRED_CAPABILITIES
    if configuration is not None and configuration.has_transparent_sockets:
        required = required | TRANSPARENT_CAPABILITIES
    if configuration is not None and _gives_sockets_away(configuration):
        required = required | _GIVING_AWAY
    found = [
        f"{_NAMES[capability]} is missing, which is for: {what}"
        for capability, what in required.items()
        if capability not in there
    ]
    if not Path("/proc/self/statm").exists():
        found.append(
            "/proc is not mounted: the fork server's limits and OpenSSL's settings need it"
        )
    # With something missing, a step may fail only because of that: then none is tried.
    if not found:
        found += [_EXPLAINED[step](why) for step, why in _tried(configuration)]
    return found


def given_up(configuration: Configuration) -> str:
    """Why this supervisor cannot serve a configuration that a reload brings; "" if it can."""
    there = permitted_capabilities()
    if configuration.has_transparent_sockets and not there.issuperset(TRANSPARENT_CAPABILITIES):
        return (
            "source_address and transparent take CAP_NET_RAW, which titus-py gave up when it was "
            "started without them: restart it"
        )
    if _gives_sockets_away(configuration) and not there.issuperset(_GIVING_AWAY):
        return (
            "socket_user takes CAP_CHOWN, without which titus-py was started (socket_group does "
            "without): add it to the unit (CapabilityBoundingSet=) and restart titus-py"
        )
    return ""


def _gives_sockets_away(configuration: Configuration) -> bool:
    """Whether a socket's file is another user's than root's."""
    return any(access.set_uid for access in configuration.socket_access.values())


def _tried(configuration: Configuration | None) -> Iterator[tuple[str, str]]:
    """The steps that fail, and why. A short-lived child tries them."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(theirs, json.dumps(_try(configuration)).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as answer:
        octets = answer.read()
    os.waitpid(child, 0)
    yield from map(tuple, json.loads(octets or b"[]"))


def _try(configuration: Configuration | None) -> list[tuple[str, str]]:
    steps: dict[str, Callable[[], object]] = {
        "groups": lambda: os.setgroups([]),
        "namespaces": lambda: leave_namespaces(
            CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWPID
        ),
    }
    keyd = configuration.keyd if configuration is not None else None
    if keyd is not None and keyd.lock_memory == "required" and keyd.socket is None:
        steps["memory"] = lock_memory
    failed = []
    for step, attempt in steps.items():
        try:
            attempt()
        except OSError as error:
            failed.append((step, error.strerror or str(error)))
    return failed


def _memory(why: str) -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    most = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit} octets"
    return (
        f"keyd cannot lock its memory, so that keys could be swapped out ({why}; RLIMIT_MEMLOCK is "
        f"{most}): CAP_IPC_LOCK is missing or, in a user namespace, a higher RLIMIT_MEMLOCK from "
        'outside; with [keyd] lock_memory = "try", keyd serves without it if it has to'
    )


_EXPLAINED: dict[str, Callable[[str], str]] = {
    "groups": lambda why: (
        f"setgroups(2) is refused ({why}): workers and keyd need it to give up root's groups; in a "
        "user namespace, map its gids with newgidmap(1)"
    ),
    "namespaces": lambda why: (
        f"new namespaces are refused ({why}), and each worker needs its own: where CAP_SYS_ADMIN "
        "is there, by a filter of system calls (seccomp) or a limit of user.max_*_namespaces"
    ),
    "memory": _memory,
}
