"""What a worker's confinement costs per connection, step by step.

Forks from a process that has loaded what the parent has, as the parent does, and lets each
child take the first so many steps of the confinement, in their order, and exit. Every round
measures every number of steps once, so that whatever else the machine does hits all alike, and
it is the processor's time that is measured, the parent's and the child's, so that waiting does
not count; a step's cost is the difference of two medians. Run as root; prints a table in Markdown.

    python bench/confinement_cost.py [--rounds 500]
"""

import argparse
import gc
import os
import platform
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import prctl
from OpenSSL import SSL

from keyd.linux import landlock, seccomp
from keyd.linux.credentials import (
    become,
    controllable_speculation,
    enter_empty_root,
    forbid_regaining,
    hide_memory,
    keep_capabilities,
    stop_speculation,
)
from keyd.linux.namespaces import empty_network_namespace, enter_network_namespace
from keyd.linux.process import CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWUTS, clone
from titus_py import confinement, parent
from titus_py.tls import reseed
from titus_py.worker_filter import ESTABLISHED, HANDSHAKE

_UID = 4_000_000


class Step(NamedTuple):
    """One more thing that a child does; ``flags`` are for clone(2)."""

    name: str
    do: Callable[[], None]
    flags: int = 0


def steps() -> list[Step]:
    """In the order of ``confinement.confine``; what is made once is made here."""
    network = empty_network_namespace()
    empty = tempfile.mkdtemp()
    os.chmod(empty, 0o755)  # noqa: S103  as the worker's: anybody may stand in it
    memory = confinement.memory_limit()
    speculation = controllable_speculation()
    ruleset = landlock.make_ruleset() if landlock.version() else None
    handshake, established = seccomp.build(HANDSHAKE), seccomp.build(ESTABLISHED)
    bounding = tuple(confinement.PARENT_CAPABILITIES)
    null = os.open(os.devnull, os.O_RDWR)
    keep_capabilities(bounding)

    def hide() -> None:
        hide_memory()
        prctl.set_pdeathsig(signal.SIGKILL)

    def deny() -> None:
        if ruleset is not None:
            landlock.restrict_self(ruleset)

    def nothing() -> None:
        pass

    return [
        Step("fork and exit, nothing else", nothing),
        Step("fresh randomness", reseed),
        Step("a pid namespace", nothing, CLONE_NEWPID),
        Step("an ipc and a uts namespace", nothing, CLONE_NEWIPC | CLONE_NEWUTS),
        Step("the empty network namespace", lambda: enter_network_namespace(network)),
        Step("chroot into an empty directory", lambda: enter_empty_root(empty)),
        Step("resource limits", lambda: confinement._limit_resources(memory)),
        Step("speculation off", lambda: stop_speculation(speculation)),
        Step("capabilities and securebits", lambda: forbid_regaining(bounding)),
        Step("a uid and gid of its own", lambda: become(_UID, _UID)),
        Step("not dumpable, ends with the parent", hide),
        Step("Landlock", deny),
        Step("all descriptors closed but two", lambda: confinement.keep_only(null, null)),
        Step("the filter", lambda: seccomp.install(handshake)),
        Step("the second filter, after the handshake", lambda: seccomp.install(established)),
    ]


def fork_and_wait(taken: list[Step]) -> float:
    """Microseconds of the processor's time, the parent's for the fork and all of the child's."""
    flags = 0
    for step in taken:
        flags |= step.flags
    begun = time.thread_time_ns()
    pid, pidfd = clone(flags)
    if not pid:
        code = 1
        try:
            for step in taken:
                step.do()
            code = 0
        finally:
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    own = time.thread_time_ns() - begun
    os.close(pidfd)
    if status:
        sys.exit(f"a child failed at {taken[-1].name}")
    return own / 1000 + (usage.ru_utime + usage.ru_stime) * 1_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=500)
    arguments = parser.parse_args()
    todo = steps()
    # The parent's generators are in use: its contexts drew from them.
    SSL.Context(SSL.TLS_SERVER_METHOD)
    gc.collect()
    gc.freeze()
    times: list[list[float]] = [[] for _ in todo]
    for _ in range(arguments.rounds):
        for number, measured in enumerate(times, 1):
            measured.append(fork_and_wait(todo[:number]))
    medians = [statistics.median(measured) for measured in times]
    size = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(
        f"Linux {platform.release().partition('-')[0]}, {os.cpu_count()} processors, "
        f"{arguments.rounds} rounds, forked from a process of {size} MiB "
        f"({parent.__name__}).\n"
    )
    print("| step | adds, µs | so far, µs |")
    print("|---|---:|---:|")
    before = 0.0
    for step, median in zip(todo, medians, strict=True):
        print(f"| {step.name} | {median - before:.0f} | {median:.0f} |")
        before = median
    print(f"\nAll of it: {medians[-1] - medians[0]:.0f} µs more than a fork alone.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
