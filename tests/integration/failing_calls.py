"""What ``test_failing_calls`` looks at, as a program: one thread, and no test runner to be forked.

Makes a worker with each of the calls of its confinement failing in turn, and one with none failing.
It prints what each said to its parent, how it ended and why, as JSON.
"""

import json
import os
import socket
import sys
from collections.abc import Sequence

from keyd.linux import landlock, prctl, seccomp
from keyd.linux.descriptors import receive_descriptors, send_descriptors
from keyd.linux.process import Call, encode, why_failed
from titus_py.between.messages import FORKED_OCTETS, Fork
from titus_py.between.report import ReportWriter, make_report, read_report
from titus_py.fork_server.confinement import RULESET_FD, Given, worker_calls
from titus_py.fork_server.forking import ORDERED, fork_as_ordered
from titus_py.worker.life import Terms, live
from titus_py.worker.system_calls import WORKER

_UID = 4_000_000_000
_FAILS = Call("dup3", (-1, -1, 0))


def made(calls: Sequence[Call], terms: Terms) -> list[object]:
    """What came of a worker with these calls."""
    parent, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours, workers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    report = make_report()
    send_descriptors(parent, Fork(_UID).encode(), [report, workers.fileno()])
    workers.close()
    # There are no more orders, and no client comes: a worker that would serve leaves.
    for one in (parent, ours):
        one.shutdown(socket.SHUT_WR)
    worker = fork_as_ordered(server.fileno(), _UID, _UID, 0, b"", encode(calls), b"", 0, b"")
    if worker is not None:
        live(terms, why_failed(calls, *worker))
    _, (pidfd,) = receive_descriptors(parent, FORKED_OCTETS, 1)
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    assert ended is not None
    return [ours.recv(100).decode(), ended.si_status, read_report(report).detail]


def main() -> int:
    # What the fork server has done for its workers. The place of the ruleset is taken from now on.
    prctl.set_no_new_privs(1)
    ruleset = landlock.make_ruleset() if landlock.version() else os.open(os.devnull, os.O_RDONLY)
    os.dup2(ruleset, RULESET_FD)
    report = ReportWriter()
    terms = Terms(1.0, None, 1.0, [], b"", report, b"")
    program = seccomp.Program(seccomp.build(WORKER))
    calls = worker_calls(program, report.address, Given(*ORDERED))
    said = {
        f"{at} {call.name}": made([*calls[:at], _FAILS, *calls[at + 1 :]], terms)
        for at, call in enumerate(calls)
    }
    print(json.dumps({**said, "none": made(calls, terms)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
