"""What a worker's confinement costs per connection, step by step.

Forks from a process that has loaded, and practised, what the fork server has, and lets each
child make the first so many of its system calls, in their order, and exit.
Every round measures every number of calls once, so that whatever else the machine does hits
all alike, and it is the processor's time that is measured, the fork server's and the child's,
so that waiting does not count; a step's cost is the difference of two medians. What the fork
server puts on itself, once, costs no connection anything. Run as root; prints Markdown.

    python -m bench.confinement_cost [--rounds 500]
"""

import argparse
import gc
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from bench.forking import fork_once
from keyd.linux import landlock, prctl, seccomp
from keyd.linux.process import CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWUTS, Call, encode
from titus_py.between.report import ReportWriter
from titus_py.fork_server import confinement
from titus_py.fork_server import life as fork_server
from titus_py.fork_server.forking import ORDERED
from titus_py.fork_server.immortality import make_all_immortal
from titus_py.fork_server.rehearsal import rehearse
from titus_py.worker.life import Terms
from titus_py.worker.system_calls import WORKER
from titus_py.worker.tls import client_hello, reseed

_UID = 4_000_000


#: What calls point to.
KEPT: list[object] = []


class Step(NamedTuple):
    """What a child is given, and does; ``calls`` are encoded."""

    name: str
    flags: int = 0
    calls: bytes = b""
    reseeds: bool = False


def steps() -> list[Step]:
    """Each holds all that came before it."""
    program = seccomp.Program(seccomp.build(WORKER))
    KEPT.append(program)
    page = ReportWriter()
    KEPT.append(page)
    if landlock.version():
        os.dup2(landlock.make_ruleset(), confinement.RULESET_FD)
    own = confinement.worker_calls(program, page.address, confinement.Given(*ORDERED))
    namespaces = CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
    found = [
        Step("fork and exit, nothing else"),
        Step("a pid namespace", CLONE_NEWPID),
        Step("an ipc and a uts namespace", namespaces),
    ]
    found += [
        Step(_name(own, number), namespaces, encode(own[: number + 1]))
        for number in range(len(own))
    ]
    found.append(Step("fresh randomness", namespaces, encode(own), reseeds=True))
    return found


def _name(calls: Sequence[Call], number: int) -> str:
    """A call's name; where there are others of that name, which of them it is."""
    name = calls[number].name
    before = sum(call.name == name for call in calls[:number])
    return f"`{name}`, again" if before else f"`{name}`"


def fork_and_wait(step: Step) -> float:
    """Microseconds of the processor's time, the fork server's for the fork and all the child's."""
    begun = time.thread_time_ns()
    child = fork_once(step.flags, step.calls, _UID)
    if not child.pid:
        if step.reseeds:
            reseed()
        os._exit(child.failed + 1)
    _, status, usage = os.wait4(child.pid, 0)
    own = time.thread_time_ns() - begun
    os.close(child.pidfd)
    if status:
        sys.exit(f"a child failed at {step.name}")
    return own / 1000 + (usage.ru_utime + usage.ru_stime) * 1_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=500)
    arguments = parser.parse_args()
    todo = steps()
    prctl.set_no_new_privs(1)
    # As the fork server does before it forks.
    rehearse(Terms(1.0, None, 1.0, [], b"", ReportWriter(), client_hello()))
    gc.collect()
    make_all_immortal()
    gc.freeze()
    times: list[list[float]] = [[] for _ in todo]
    for _ in range(arguments.rounds):
        for step, measured in zip(todo, times, strict=True):
            measured.append(fork_and_wait(step))
    medians = [statistics.median(measured) for measured in times]
    size = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(
        f"Linux {platform.release().partition('-')[0]}, {os.cpu_count()} processors, "
        f"{arguments.rounds} rounds, forked from a process of {size} MiB "
        f"({fork_server.__name__}).\n"
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
