"""The resolver's life: confine itself, then look up names, until the supervisor hangs up.

Started by the supervisor, as root, if a backend has a name; it serves as a uid of its own. It is
the process that reads what name servers send, by way of glibc and of the modules that
nsswitch.conf(5) names. So what it may do is taken away first. It trusts the supervisor.
"""

import json
import os
import signal
import socket
import sys
import threading

import prctl

from keyd.linux import seccomp
from keyd.linux.descriptors import inherited_descriptors
from keyd.linux.sealed import read_all
from keyd.linux.title import set_title
from titus_py.between.lookups import MAX_OCTETS, Answer, Question
from titus_py.between.unprivileged import ALIVE, READY
from titus_py.resolver.confinement import confine

__all__ = ["main"]

_HOSTS = "/etc/hosts"
_STACK_OCTETS = 1024 * 1024


def main() -> int:
    """``python -m titus_py.resolver.life``: started by the supervisor, on inherited descriptors."""
    given = inherited_descriptors(sys.argv[1:])
    set_title("titus-resolver", "titus-py: resolver")
    settings = json.loads(read_all(given["--settings-fd"]))
    supervisor = socket.socket(fileno=given["--supervisor-fd"])
    supervisor.set_inheritable(False)
    confine(settings["uid"], seccomp.Program(bytes.fromhex(settings["filter"])))
    # A change of uid clears the parent-death signal.
    prctl.set_pdeathsig(signal.SIGKILL)
    threading.stack_size(_STACK_OCTETS)
    # How often to tell the supervisor that this process is alive.
    supervisor.settimeout(settings["alive_seconds"])
    supervisor.send(READY)
    while True:
        try:
            message = supervisor.recv(MAX_OCTETS)
        except TimeoutError:
            supervisor.send(ALIVE)
            continue
        if not message:
            break
        question = Question.decode(message)
        # A thread for each: it waits as long as the name servers take.
        threading.Thread(target=_answer, args=(supervisor, question), daemon=True).start()
    # Without waiting for threads that wait for name servers.
    os._exit(0)


def _answer(supervisor: socket.socket, question: Question) -> None:
    try:
        answer = Answer(question.number, 0, _look_up(question))
    except OSError as error:
        # Anything but getaddrinfo's own errors: of the system, and passing.
        known = isinstance(error, socket.gaierror) and error.errno
        answer = Answer(question.number, known or socket.EAI_SYSTEM, ())
    supervisor.send(answer.encode(question.family))


def _look_up(question: Question) -> tuple[tuple[str, int], ...]:
    """A name's addresses of one family, at least one. Blocks. Raises OSError."""
    # A name in /etc/hosts is asked for without a family. Otherwise a name with only an IPv4
    # address there would be looked up in the DNS too, and its connections would go there.
    listed = _is_in_hosts_file(question.name)
    family = socket.AF_UNSPEC if listed else question.family
    # As octets: for a str, Python would load its code for international names.
    answers = socket.getaddrinfo(question.name.encode(), None, family, socket.SOCK_STREAM)
    found = dict.fromkeys(
        # The interface is in the scope. If Python was built without IPv6, an address is something
        # else than text.
        (str(address[0]).partition("%")[0], int(address[3]) if len(address) == 4 else 0)
        for of, _, _, _, address in answers
        if of == question.family and isinstance(address[0], str)
    )
    if not found:
        raise socket.gaierror(socket.EAI_NODATA, "No address associated with hostname")
    return tuple(found)


def _is_in_hosts_file(name: str) -> bool:
    """Whether hosts(5) has the name. A line is an address and its names; # begins a comment."""
    try:
        with open(_HOSTS, encoding="utf-8", errors="replace") as file:
            lines = file.read().lower().splitlines()
    except OSError:
        return False
    return any(name.lower() in line.partition("#")[0].split()[1:] for line in lines)


if __name__ == "__main__":
    sys.exit(main())
