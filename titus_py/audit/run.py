"""An audit from beginning to end. Run by ``titus-py audit`` and the pytest plugin, as root."""

import platform
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import NamedTuple

from titus_py.audit import credentials, descriptors, hardening, limits, memory, surroundings
from titus_py.audit.announcement import announce
from titus_py.audit.finding import (
    Check,
    Finding,
    Seen,
    Subject,
    Verdict,
    broken,
    holds,
    not_available,
)
from titus_py.audit.instance import Process, Role
from titus_py.audit.observation import Scene, Stage, has_backend
from titus_py.audit.probe import NO_CERTIFICATE, Hindered, Probe, Unanswered
from titus_py.audit.refusals import ask_keyd
from titus_py.audit.target import Target

__all__ = ["CHECKS", "UNSEEN", "Audit", "Host", "audit"]

#: All that is looked at in a process, in this order.
CHECKS: tuple[Check, ...] = (
    *credentials.CHECKS,
    *surroundings.CHECKS,
    *limits.CHECKS,
    *descriptors.CHECKS,
    *memory.CHECKS,
    *hardening.CHECKS,
)

#: What no audit from outside can show; each is tried by the attack suite instead.
UNSEEN = (
    "what a process's seccomp filter allows (that it has one is seen, and how many)",
    "that processes have put their Landlock rulesets on (that the fork server's is there is seen)",
    "that a process is killed when its parent dies",
    "a process's securebits",
    "that each worker draws random octets of its own",
    "a key that is hidden: encrypted, in pieces, or in what is in no process's memory",
)

#: How long a worker may take to confine itself; until then it has no client.
_CONFINING_SECONDS = 3.0
#: Processes come, go and move on while they are looked at. What does not hold is looked at
#: again, this many times in all, and after this pause.
_LOOKS, _PAUSE_SECONDS = 4, 0.15
#: How long a worker may take after its client's handshake, besides connecting to the backend.
_ESTABLISHING_SECONDS = 10.0


class Host(NamedTuple):
    """Where the audit was made, and by what."""

    name: str
    kernel: str
    machine: str
    python: str
    titus_py: str


class Audit(NamedTuple):
    """All findings about one instance."""

    supervisor: int
    source: str
    listening: tuple[str, ...]
    host: Host
    at: datetime
    seconds: float
    findings: tuple[Finding, ...]

    def having(self, verdict: Verdict) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict is verdict]

    @property
    def holds(self) -> bool:
        """Whether no promise was found broken."""
        return not self.having(Verdict.BROKEN)


def audit(target: Target) -> Audit:
    """Make all checks. Raises CannotAudit: the instance has ended, or this takes too long."""
    at, start = datetime.now(UTC), time.monotonic()
    findings: list[Finding] = []
    try:
        for finding in _findings(target):
            findings.append(finding)
    except Hindered as error:
        # Too little was looked at. But what was found broken is so all the same.
        if not _any_broken(findings):
            raise
        findings.append(_of_the_connection(not_available(str(error))))
    uname = platform.uname()
    return Audit(
        target.supervisor.pid,
        target.source,
        tuple(map(str, target.configuration.listening)),
        Host(
            uname.node,
            f"{uname.system} {uname.release} {uname.version}",
            uname.machine,
            platform.python_version(),
            version("titus-py"),
        ),
        at,
        round(time.monotonic() - start, 3),
        tuple(findings),
    )


def _findings(target: Target) -> Iterator[Finding]:
    processes = target.processes()
    yield _only_known(target)
    yield from _examine(target, {process: "" for process in processes if process.role in _KNOWN})
    if not target.configuration.vhost:
        yield from _without_a_client(target)
        return
    stages: dict[int, str] = {}
    try:
        with Probe(target) as probe:
            yield probe.find_worker()
            if probe.worker is not None:
                yield from _examine(target, {probe.worker: "before its handshake"})
            yield probe.shake_hands()
            if probe.worker is not None:
                yield from _established(target, probe.worker, probe.is_refused)
                stages[probe.worker.pid] = "after its handshake"
            scene = Scene(target)
            alive = [seen.process for seen in scene.observations]
            for observed in scene.observations:
                stages.setdefault(observed.pid, observed.stage)
            yield from memory.look_for_keys(target, alive, stages)
            yield from ask_keyd(scene, probe.certificate, announce(target.supervisor.pid))
            yield probe.end()
    except Unanswered as error:
        yield _of_the_connection(broken(str(error)))


def _without_a_client(target: Target) -> Iterator[Finding]:
    """Tunnels alone serve programs of this machine's: whom they reach is not the audit's to ask."""
    scene = Scene(target)
    alive = [seen.process for seen in scene.observations]
    stages = {observed.pid: observed.stage for observed in scene.observations}
    yield from memory.look_for_keys(target, alive, stages)
    yield _of_the_connection(not_available("there is no virtual host to connect to"))


def _of_the_connection(seen: Seen) -> Finding:
    return Finding(
        "connection",
        Subject(Role.WORKER, 0, 0),
        "a client that comes is served",
        "a connection like any client's",
        seen.text,
        seen.verdict,
    )


_IN_ORDER = (
    Role.SUPERVISOR,
    Role.KEYD,
    Role.MODULE,
    Role.CONNECTOR,
    Role.PARENT,
    Role.FORK_SERVER,
    Role.WORKER,
    Role.RESOLVER,
    Role.METRICS,
)
_KNOWN = frozenset(_IN_ORDER)


def _only_known(target: Target) -> Finding:
    for _ in range(_LOOKS):
        processes = target.processes()
        strangers = [process for process in processes if process.role not in _KNOWN]
        if not strangers:
            break
        # The supervisor may have a helper that checks a new configuration: it ends soon.
        time.sleep(_PAUSE_SECONDS)
    if strangers:
        seen = broken(", ".join(f"{p.pid} (uid {p.uid}), a child of {p.ppid}" for p in strangers))
    else:
        counts = {role: sum(p.role is role for p in processes) for role in _IN_ORDER}
        seen = holds(", ".join(f"{count} x {role}" for role, count in counts.items()))
    return Finding(
        "processes",
        Subject.of(target.supervisor),
        "no process below it but keyd, its tokens' and upstreams' processes, the parent, its fork "
        "server, its workers, the resolver and what serves the metrics",
        "/proc/PID/stat of all processes",
        seen.text,
        seen.verdict,
    )


def _examine(
    target: Target, wanted: dict[Process, str], only: Stage | None = None
) -> Iterator[Finding]:
    """Findings about these processes; none about a process that ends while something is broken.

    ``wanted`` has, for each process, the name of its stage; if that is empty, ``Scene`` finds it.
    With ``only``, a worker is not judged while it is seen in another stage.
    """
    keys = {(process.pid, process.started): stage for process, stage in wanted.items()}
    latest: dict[tuple[int, int], list[Finding]] = {}
    # The probe's worker has a client: if it is not confined yet, it never will be.
    has_client = any(wanted.values())
    deadline = time.monotonic() + (0.0 if has_client else _CONFINING_SECONDS)
    for look in range(_LOOKS):
        scene = Scene(target, deadline)
        pending = {}
        for seen in scene.observations:
            key = seen.process.pid, seen.process.started
            if key not in keys or (key in latest and not _any_broken(latest[key])):
                continue
            if only is not None and seen.stage != only:
                continue
            found = [
                check.find(seen, scene) for check in CHECKS if seen.process.role in check.roles
            ]
            if keys[key]:
                found = [_called(finding, keys[key]) for finding in found]
            latest[key] = pending[key] = found
        for key in [key for key in latest if key not in pending and _any_broken(latest[key])]:
            # The process has ended: that may be why something did not hold.
            del latest[key]
        if not any(map(_any_broken, latest.values())):
            break
        if look < _LOOKS - 1:
            time.sleep(_PAUSE_SECONDS)
    for found in latest.values():
        yield from found


def _any_broken(findings: Sequence[Finding]) -> bool:
    return any(finding.verdict is Verdict.BROKEN for finding in findings)


def _called(finding: Finding, stage: str) -> Finding:
    return finding._replace(subject=finding.subject._replace(stage=stage))


def _established(target: Target, worker: Process, is_refused: bool) -> Iterator[Finding]:
    """What the checks say of the probe's worker once it has its backend.

    The client's handshake may be done before the worker's is. Until the worker has its backend,
    it may still have what only the handshake needs; when it has, it has given that up.
    """
    patience = target.configuration.worker.connect_timeout + _ESTABLISHING_SECONDS
    seen = not_available("it ended before it could be looked at: is there a backend?")
    if is_refused:
        seen = not_available(NO_CERTIFICATE)
    elif not _gets_backend(target, worker, patience):
        seen = not_available(f"{patience:g} s after its client's handshake it has no backend")
    elif found := list(_examine(target, {worker: "after its handshake"}, Stage.ESTABLISHED)):
        yield from found
        return
    yield Finding(
        "connection",
        Subject.of(worker, "after its handshake"),
        "confined all the more once its handshake is done",
        "the same checks once more",
        seen.text,
        seen.verdict,
    )


def _gets_backend(target: Target, worker: Process, seconds: float) -> bool:
    """Wait until a worker has its backend, or has ended; returns whether it did in time."""
    deadline = time.monotonic() + seconds
    try:
        while not has_backend(worker, target):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
    except (FileNotFoundError, ProcessLookupError):
        pass
    return True
