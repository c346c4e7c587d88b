"""Checks: a process's user and groups, its privileges, and who can look into it.

Run by ``titus-py audit``. Each thread has its own credentials (credentials(7)), so each
thread of a process is looked at.
"""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterable

import prctl

from titus_py.audit.finding import Check, Seen, broken, holds
from titus_py.audit.instance import Role
from titus_py.audit.observation import Observation, Scene
from titus_py.configuration.address import UnixAddress
from titus_py.fork_server.confinement import (
    FORK_SERVER_CAPABILITIES,
    PARENT_CAPABILITIES,
    TRANSPARENT_CAPABILITIES,
)
from titus_py.supervisor.privileges import SUPERVISOR_CAPABILITIES

__all__ = ["CHECKS"]

_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_NAMES_OF_SETS = ("CAP_EFFECTIVE", "CAP_PERMITTED", "CAP_INHERITABLE")
_CAP_SYS_PTRACE = 19
_CAPABILITY_VERSION_3 = 0x2008_0522


def _uid(seen: Observation, scene: Scene) -> Seen:
    threads = {
        (name, number)
        for thread in seen.threads
        for name in ("Uid", "Gid")
        for number in thread[name].split()
    }
    uids = sorted({number for name, number in threads if name == "Uid"})
    gids = sorted({number for name, number in threads if name == "Gid"})
    text = f"uid {' and '.join(uids)}, gid {' and '.join(gids)}"
    others = [
        f"{process.pid} (uid {process.uid})"
        for process in scene.everyone
        if process.uid == int(uids[0]) and process.pid != seen.pid
    ]
    if others:
        return broken(f"{text}; also that of process {', '.join(others)}")
    if len(uids) > 1 or len(gids) > 1:
        return broken(text)
    if seen.process.role is Role.KEYD:
        user = scene.target.configuration.keyd.user
        right = (int(uids[0]), int(gids[0])) == (user.uid, user.gid)
        newest = scene.newest(Role.KEYD) is seen and scene.target.started(seen.process)
    elif seen.process.role is Role.PARENT:
        right = int(uids[0]) in scene.target.configuration.worker.uids and uids == gids
        newest = scene.newest(Role.PARENT) is seen
    elif seen.process.role in _SINGLE:
        # It may have its uid from a configuration before this one.
        right, newest = uids == gids, False
    else:
        right = int(uids[0]) in scene.target.configuration.worker.uids and uids == gids
        parent = scene.newest(Role.PARENT)
        newest = parent is not None and parent.pid == seen.process.ppid
    # A process of an earlier configuration, still there after a reload, has the ids that that
    # one said. A keyd that is a service of its own has the ids that its service says.
    right = right or (not newest and "0" not in uids + gids)
    if not right:
        return broken(f"{text}: not what the configuration says")
    return holds(f"{text}; no other of {len(scene.everyone)} processes in sight has it")


def _groups(seen: Observation, scene: Scene) -> Seen:
    groups = sorted({group for thread in seen.threads for group in thread["Groups"].split()})
    if seen.process.role is Role.KEYD and not scene.target.started(seen.process):
        # systemd's User= adds the user's own group, which gives nothing that its gid does not.
        own = seen.threads[0]["Gid"].split()[1]
        if groups == [own]:
            return holds(f"{own}, which is its gid as well")
    allowed: set[str] = set()
    if seen.process.role is Role.PARENT:
        of_backends = scene.target.configuration.worker.backend_groups or ()
        allowed = {str(group.gid) for group in of_backends}
    if beyond := sorted({*groups} - allowed):
        return broken(f"groups {', '.join(beyond)}")
    return holds(f"{', '.join(groups)}, for backends' sockets" if groups else "none")


def _no_capabilities(seen: Observation, _: Scene) -> Seen:
    return _at_most(seen, 0, 0)


def _capabilities_to_fork(seen: Observation, _: Scene) -> Seen:
    # The fork server never executes a program, and its workers must not have any capability.
    return _at_most(seen, _mask(FORK_SERVER_CAPABILITIES), 0)


def _few_capabilities(seen: Observation, _: Scene) -> Seen:
    # It keeps what the configuration took with which it was started, and may have another now.
    kept = _mask({*SUPERVISOR_CAPABILITIES, *TRANSPARENT_CAPABILITIES})
    return _at_most(seen, kept, kept)


def _capabilities_to_end_workers(seen: Observation, scene: Scene) -> Seen:
    kept = set(PARENT_CAPABILITIES)
    vhosts = scene.target.configuration.vhost
    reached = {one for vhost in vhosts for _, one in vhost.all_backends}
    reached.update(*(tunnel.connect for tunnel in scene.target.configuration.tunnel))
    by_groups = scene.target.configuration.worker.backend_groups is not None
    if not by_groups and any(isinstance(one, UnixAddress) for one in reached):
        kept.add(prctl.CAP_DAC_OVERRIDE)
    if any(vhost.source_address for vhost in vhosts):
        kept |= TRANSPARENT_CAPABILITIES.keys()
    return _at_most(seen, _mask(kept), 0)


def _mask(capabilities: Iterable[int]) -> int:
    return sum(1 << capability for capability in capabilities)


def _at_most(seen: Observation, allowed: int, bounding: int) -> Seen:
    # The inheritable and ambient sets must be empty: a program could get capabilities from them.
    masks = dict.fromkeys(_SETS, allowed) | {"CapBnd": bounding, "CapInh": 0, "CapAmb": 0}
    excess = {
        f"{name} has {_names(beyond)}"
        for thread in seen.threads
        for name, mask in masks.items()
        if (beyond := int(thread[name], 16) & ~mask)
    }
    if excess:
        return broken(f"{'; '.join(sorted(excess))}{_of_threads(seen)}")
    held = int(seen.threads[0]["CapPrm"], 16)
    return holds(f"{_names(held) if held else 'all five sets empty'}{_of_threads(seen)}")


def _names(mask: int) -> str:
    known = {
        number: name.lower()
        for name, number in vars(prctl).items()
        if name.startswith("CAP_") and name not in _NAMES_OF_SETS
    }
    numbers = [number for number in range(mask.bit_length()) if mask >> number & 1]
    if len(numbers) > 10:
        return f"{len(numbers)} capabilities"
    return ", ".join(known.get(number, f"capability {number}") for number in numbers)


def _of_threads(seen: Observation) -> str:
    return f" ({len(seen.threads)} threads)" if len(seen.threads) > 1 else ""


def _no_new_privs(seen: Observation, _: Scene) -> Seen:
    values = {thread["NoNewPrivs"] for thread in seen.threads}
    text = f"NoNewPrivs {' and '.join(sorted(values))}{_of_threads(seen)}"
    return holds(text) if values == {"1"} else broken(text)


def _hidden_by_owner(seen: Observation, _: Scene) -> Seen:
    owner = seen.owner_of_proc
    if owner == 0:
        return holds(f"/proc/{seen.pid}/environ is root's, though the process is not")
    return broken(f"/proc/{seen.pid}/environ is uid {owner}'s")


def _hidden_by_attempt(seen: Observation, _: Scene) -> Seen:
    if _can_look_into(seen.pid):
        return broken("a root process without CAP_SYS_PTRACE can look into it")
    if not _control():
        return broken(
            "a root process without CAP_SYS_PTRACE cannot look into a dumpable one either"
        )
    return holds("refused; at a dumpable process, the same succeeds")


def _control() -> bool:
    """The control: whether a process like these, but dumpable, can be looked into."""
    program = (
        "from keyd.linux.credentials import keep_capabilities\n"
        "keep_capabilities([])\n"
        "print(flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-I", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        result = _can_look_into(process.pid)
        process.communicate(b"\n")
    return result


def _can_look_into(pid: int) -> bool:
    """Whether a root thread without CAP_SYS_PTRACE can (ptrace(2), PTRACE_MODE_READ)."""
    results = []

    def attempt() -> None:
        # Each thread has its own capabilities: only this thread loses one, and it ends here.
        libc = ctypes.CDLL(None, use_errno=True)
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        sets = (ctypes.c_uint32 * 6)()
        if libc.capget(header, sets):
            raise OSError(ctypes.get_errno(), "capget")
        sets[0] &= ~(1 << _CAP_SYS_PTRACE)
        if libc.capset(header, sets):
            raise OSError(ctypes.get_errno(), "capset")
        try:
            os.readlink(f"/proc/{pid}/cwd")
            results.append(True)
        except OSError:
            results.append(False)  # also where it has ended

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return results == [True]


#: The only process of its kind, whatever generations there are.
_SINGLE = frozenset({Role.RESOLVER, Role.METRICS})
_UNPRIVILEGED = frozenset({Role.WORKER, Role.KEYD}) | _SINGLE
_UIDS_OF_THEIR_OWN = _UNPRIVILEGED | {Role.PARENT}
_ROOT = frozenset({Role.SUPERVISOR, Role.FORK_SERVER})
#: Workers inherit this from the fork server, which confined itself.
_CONFINED = _UIDS_OF_THEIR_OWN | {Role.FORK_SERVER}
_OF_KEYD = frozenset({Role.MODULE, Role.CONNECTOR})
_STATUS = "/proc/PID/task/*/status"

CHECKS = (
    Check(
        "uid",
        frozenset({Role.WORKER, Role.PARENT}),
        "a uid and gid of its own, out of worker.uids",
        f"{_STATUS}: Uid, Gid; those of all processes",
        _uid,
    ),
    Check(
        "uid",
        frozenset({Role.KEYD}),
        "keyd.user, which nothing else runs as",
        f"{_STATUS}: Uid, Gid; those of all processes",
        _uid,
    ),
    Check(
        "uid",
        _SINGLE,
        "a uid and gid that no other process has",
        f"{_STATUS}: Uid, Gid; those of all processes",
        _uid,
    ),
    Check("groups", _CONFINED, "no supplementary groups", f"{_STATUS}: Groups", _groups),
    Check(
        "capabilities",
        _UNPRIVILEGED | _OF_KEYD,
        "no capability, nor a way to one",
        f"{_STATUS}: {', '.join(_SETS)}",
        _no_capabilities,
    ),
    Check(
        "capabilities",
        frozenset({Role.FORK_SERVER}),
        "only the capabilities that forking workers takes, and no way to another",
        f"{_STATUS}: {', '.join(_SETS)}",
        _capabilities_to_fork,
    ),
    Check(
        "capabilities",
        frozenset({Role.SUPERVISOR}),
        "only the capabilities that it uses, none inheritable or ambient",
        f"{_STATUS}: {', '.join(_SETS)}",
        _few_capabilities,
    ),
    Check(
        "capabilities",
        frozenset({Role.PARENT}),
        "only the capabilities that it uses, and no way to another",
        f"{_STATUS}: {', '.join(_SETS)}",
        _capabilities_to_end_workers,
    ),
    Check(
        "no_new_privs",
        _CONFINED | _ROOT | _OF_KEYD,
        "no_new_privs: no program could give it more",
        f"{_STATUS}: NoNewPrivs",
        _no_new_privs,
    ),
    Check(
        "hidden",
        _UIDS_OF_THEIR_OWN | _OF_KEYD,
        "not dumpable: its memory is closed to its own uid",
        "owner of /proc/PID/environ",
        _hidden_by_owner,
    ),
    Check(
        "hidden",
        _ROOT,
        "not dumpable: its memory takes CAP_SYS_PTRACE to see",
        "attempt on /proc/PID/cwd as root without CAP_SYS_PTRACE",
        _hidden_by_attempt,
    ),
)
