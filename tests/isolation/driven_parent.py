"""The real parent, with a fork server whose workers can be taken over.

Started by ``driver`` in place of ``titus_py.parent.life``, with one more argument before the
others: the JSON for ``infected_fork_server``, some of which is for the parent itself.
"""

import json
import os
import re
import secrets
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import prctl

from keyd.linux.namespaces import leave_namespaces
from keyd.linux.process import CLONE_NEWPID
from titus_py.between.messages import Ends
from titus_py.parent import confinement, dialer, forks
from titus_py.parent import life as parent
from titus_py.parent.worker import Worker

__all__ = ["main"]


def _leave_out_the_dialers_question() -> None:
    """The backend's socket as a non-blocking connect leaves it: on this machine, connected."""

    def outcome(self: dialer.Dialer, attempt: socket.socket, address: object) -> int:
        del self, attempt, address
        return 0

    dialer.Dialer._outcome = outcome  # type: ignore[method-assign]


class _Connections(parent.Connections):
    """Numbers them from where no other number in memory is found by chance.

    The real one begins with the microseconds since boot, and for a quarter of an hour these
    are what the heap's addresses are.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.next_number = 1 << 62 | secrets.randbits(62)


class _Gullible(_Connections):
    """Takes a client's address from its worker at any time."""

    def _alarm(self, worker: Worker, event: str, attempted: str) -> None:
        said = re.match(r"Proxied\(ends=Ends\((.*)\)\)", attempted)
        if said is None:
            super()._alarm(worker, event, attempted)
            return
        words = [word.partition("=")[2].strip("'") for word in said[1].split(", ")]
        ends = Ends(words[0], int(words[1]), words[2], int(words[3]))
        self._introduced(worker, ends)


class _Executing(_Connections):
    """Executes another program in place of a client's being served."""

    def begin(self, *_: Any) -> NoReturn:
        os.execv("/bin/true", ["true"])


def _become_process_one() -> None:
    """Process 1 of a pid namespace, as in a container; ends with it, and it with this one."""
    leave_namespaces(CLONE_NEWPID)
    child = os.fork()
    if not child:
        prctl.set_pdeathsig(signal.SIGKILL)
        return
    # Nothing of what the real one holds is kept open here.
    os.closerange(3, 1 << 20)
    prctl.set_pdeathsig(signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def main() -> NoReturn:
    argument = sys.argv.pop(1)
    without = json.loads(argument)
    if "process one" in without:
        _become_process_one()
    if "dialer" in without:
        _leave_out_the_dialers_question()
    parent.Connections = _Gullible if "once" in without else _Connections  # type: ignore[misc]
    if "parent serves" in without:
        parent.Connections = _Executing  # type: ignore[misc]
    if "parent filter" in without:
        confinement.seccomp.install = lambda _: None  # type: ignore[assignment,misc]
    forks._PROGRAM = (str(Path(__file__).with_name("infected_fork_server.py")), argument)
    sys.exit(parent.main())


if __name__ == "__main__":
    main()
