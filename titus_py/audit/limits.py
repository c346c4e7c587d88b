"""Checks: what the kernel refuses a process: system calls, resources, speculation.

Run by ``titus-py audit``. What a filter allows cannot be read from outside without stopping
the process; the lists are in ``titus_py.worker.system_calls`` and ``keyd.system_calls``.
"""

import resource
from collections.abc import Mapping

from keyd.linux import landlock
from titus_py.audit.finding import Check, Seen, broken, holds, not_available
from titus_py.audit.instance import Role
from titus_py.audit.observation import Observation, Scene
from titus_py.fork_server.confinement import LANDLOCK, MEMORY_OCTETS, SPECULATION
from titus_py.metrics.confinement import LIMITS as METRICS_LIMITS
from titus_py.resolver.confinement import LIMITS as RESOLVER_LIMITS

__all__ = ["CHECKS"]

#: What the fork server may have at most, in the words of /proc/PID/limits.
_FORK_SERVER_LIMITS = {
    "file size": 0,
    "core file size": 0,
    "open files": 64,
    "locked memory": 0,
    "pending signals": 0,
    "msgqueue size": 0,
    "nice priority": 0,
    "realtime priority": 0,
}
#: What a worker may have at most.
_WORKER_LIMITS = {**_FORK_SERVER_LIMITS, "open files": 8, "processes": 0}
_ADDRESS_SPACE = "address space"
#: The words of /proc/PID/limits for what these two limit.
_LIMITS = {
    resource.RLIMIT_AS: _ADDRESS_SPACE,
    resource.RLIMIT_NPROC: "processes",
    resource.RLIMIT_NOFILE: "open files",
    resource.RLIMIT_FSIZE: "file size",
    resource.RLIMIT_MEMLOCK: "locked memory",
    resource.RLIMIT_MSGQUEUE: "msgqueue size",
    resource.RLIMIT_NICE: "nice priority",
    resource.RLIMIT_RTPRIO: "realtime priority",
}

#: How /proc/PID/status says that there is nothing to turn off, that it is off for good, and
#: that it cannot be turned off.
_SAFE = {"not vulnerable", "not affected", "globally mitigated", "always disabled"}
_OFF = {"thread force mitigated", "conditional force disabled"}
_FIXED = {"vulnerable", "always enabled", "unknown", "unsupported"}


def _filter(seen: Observation, scene: Scene) -> Seen:
    modes = {thread["Seccomp"] for thread in seen.threads}
    if modes != {"2"}:
        return broken(f"{len(seen.threads)} threads, Seccomp {' and '.join(sorted(modes))}")
    counts = {thread.get("Seccomp_filters") for thread in seen.threads}
    if None in counts:
        return not_available("Seccomp 2; this kernel does not say how many filters there are")
    if seen.process.role is Role.KEYD and not scene.target.started(seen.process):
        # Its service manager may have installed filters before.
        return holds(f"Seccomp 2, {' and '.join(map(str, counts))} filters")
    expected = scene.inherited_filters + 1
    threads = f"; {len(seen.threads)} threads" if len(seen.threads) > 1 else ""
    text = f"Seccomp 2, {' and '.join(str(count) for count in counts)} filters{threads}"
    if scene.inherited_filters:
        text += f", {scene.inherited_filters} of them inherited by the supervisor"
    if counts != {str(expected)}:
        return broken(f"{text}; expected {expected}")
    return holds(text)


def _filter_of_module(seen: Observation, scene: Scene) -> Seen:
    if seen.process.ppid in {keyd.pid for keyd in scene.of(Role.KEYD)}:
        return holds("none for the first process, which loads no module: its child has one")
    return _filter(seen, scene)


def _limits(seen: Observation, scene: Scene) -> Seen:
    is_worker = seen.process.role is Role.WORKER
    most: dict[str, int] = dict(_WORKER_LIMITS if is_worker else _FORK_SERVER_LIMITS)
    # The bound was computed from what the fork server had when it was confined.
    servers = scene.of(Role.FORK_SERVER)
    peaks = [int(server.threads[0]["VmPeak"].split()[0]) * 1024 for server in servers]
    if peaks:
        most[_ADDRESS_SPACE] = max(peaks) + MEMORY_OCTETS
    loose = [
        f"{name}: {values[1]}"
        for name, limit in most.items()
        if (values := seen.limits.get(name)) and not _within(values[1], limit)
    ]
    if loose or seen.limits.get(_ADDRESS_SPACE, ("", "unlimited"))[1] == "unlimited":
        return broken("; ".join(loose) or "address space: unlimited")
    memory = int(seen.limits[_ADDRESS_SPACE][1]) >> 20
    files = seen.limits["open files"][1]
    rest = "of all the rest 0" if is_worker else "of all the rest but processes 0"
    return holds(f"{memory} MiB of address space, {files} descriptors; {rest}")


def _limits_of_resolver(seen: Observation, _: Scene) -> Seen:
    return _at_most(seen, RESOLVER_LIMITS)


def _limits_of_metrics(seen: Observation, _: Scene) -> Seen:
    return _at_most(seen, METRICS_LIMITS)


def _at_most(seen: Observation, limits: Mapping[int, int]) -> Seen:
    loose = [
        f"{name}: {seen.limits[name][1]}"
        for number, most in limits.items()
        if (name := _LIMITS[number]) in seen.limits and not _within(seen.limits[name][1], most)
    ]
    if loose:
        return broken("; ".join(loose))
    files, threads = (seen.limits[name][1] for name in ("open files", "processes"))
    return holds(f"{files} descriptors, {threads} threads; it can write no file")


def _within(limit: str, most: int) -> bool:
    return limit != "unlimited" and int(limit) <= most


def _no_core(seen: Observation, _: Scene) -> Seen:
    soft, hard = seen.limits["core file size"]
    text = f"core file size: {soft}, hard {hard}"
    return holds(text) if (soft, hard) == ("0", "0") else broken(text)


def _speculation(seen: Observation, scene: Scene) -> Seen:
    found, verdicts = [], set()
    for name in ("Speculation_Store_Bypass", "SpeculationIndirectBranch"):
        state = seen.threads[0].get(name, "unknown")
        found.append(f"{name}: {state}")
        known = state in _SAFE or state in _OFF
        verdicts.add("off" if known else "fixed" if state in _FIXED else "on")
    text = "; ".join(found)
    if "on" in verdicts:
        return broken(text)
    if "fixed" in verdicts:
        required = SPECULATION in scene.target.configuration.worker.require
        required = required and seen.process.role is not Role.KEYD
        return broken(f"{text}; required by worker.require") if required else not_available(text)
    return holds(text)


def _landlock(seen: Observation, scene: Scene) -> Seen:
    version = landlock.version()
    if not version:
        text = "this kernel has no Landlock, or it is off"
        required = LANDLOCK in scene.target.configuration.worker.require
        return broken(f"{text}; required by worker.require") if required else not_available(text)
    if "anon_inode:[landlock-ruleset]" in seen.descriptors.values():
        return holds(f"Landlock, version {version} of its interface; the ruleset is there")
    return broken(f"the kernel has Landlock, version {version}, and the fork server no ruleset")


CHECKS = (
    Check(
        "filter",
        frozenset({Role.WORKER}),
        "one seccomp filter, from its beginning to its end",
        "/proc/PID/status: Seccomp, Seccomp_filters",
        _filter,
    ),
    Check(
        "filter",
        frozenset({Role.PARENT}),
        "a seccomp filter of its own",
        "/proc/PID/status: Seccomp, Seccomp_filters",
        _filter,
    ),
    Check(
        "filter",
        frozenset({Role.KEYD}),
        "a seccomp filter on each of its threads",
        "/proc/PID/task/*/status: Seccomp, Seccomp_filters",
        _filter,
    ),
    Check(
        "filter",
        frozenset({Role.RESOLVER, Role.METRICS, Role.CONNECTOR}),
        "a seccomp filter on each of its threads",
        "/proc/PID/task/*/status: Seccomp, Seccomp_filters",
        _filter,
    ),
    Check(
        "filter",
        frozenset({Role.MODULE}),
        "a seccomp filter on each thread of what runs the token's module",
        "/proc/PID/task/*/status: Seccomp, Seccomp_filters",
        _filter_of_module,
    ),
    Check(
        "limits",
        frozenset({Role.RESOLVER}),
        "no files written; memory, threads and descriptors bounded",
        "/proc/PID/limits, hard limits",
        _limits_of_resolver,
    ),
    Check(
        "limits",
        frozenset({Role.METRICS}),
        "no processes, no files written; memory and descriptors bounded",
        "/proc/PID/limits, hard limits",
        _limits_of_metrics,
    ),
    Check(
        "limits",
        frozenset({Role.WORKER}),
        "no processes, no files, no core dump; memory and descriptors bounded",
        "/proc/PID/limits, hard limits",
        _limits,
    ),
    Check(
        "limits",
        frozenset({Role.FORK_SERVER}),
        "no files, no core dump; memory and descriptors bounded",
        "/proc/PID/limits, hard limits",
        _limits,
    ),
    Check(
        "limits",
        frozenset({Role.SUPERVISOR, Role.PARENT, Role.KEYD, Role.RESOLVER, Role.METRICS}),
        "no core dump",
        "/proc/PID/limits",
        _no_core,
    ),
    Check(
        "speculation",
        frozenset({Role.FORK_SERVER, Role.WORKER, Role.KEYD, Role.RESOLVER, Role.METRICS}),
        "indirect-branch and store-bypass speculation off for good, where it can be",
        "/proc/PID/status: Speculation*",
        _speculation,
    ),
    Check(
        "landlock",
        frozenset({Role.FORK_SERVER}),
        "a Landlock ruleset that grants nothing, for itself and for each worker to put on",
        "its descriptor; that they have put it on cannot be seen from outside: one that could "
        "not does not serve",
        _landlock,
    ),
)
