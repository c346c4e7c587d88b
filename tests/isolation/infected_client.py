"""The audit's client, with its peer in control of it: started in its place by ``test_auditor``.

``python -I infected_client.py ATTEMPT LAYERS ...``: what follows are the client's own arguments.
LAYERS is "all", "no filter" or "none": what is left of its confinement. Where the client would
make its handshake, it makes the attempt instead, and answers what came of it.
"""

import errno
import os
import signal
import socket
import sys
from collections.abc import Callable

from titus_py.audit import client


def read_a_file() -> None:
    os.close(os.open("/etc/passwd", os.O_RDONLY))


def connect() -> None:
    with socket.socket() as another:
        # Nobody listens there: refused is as good as connected.
        if (result := another.connect_ex(("127.0.0.1", 1))) != errno.ECONNREFUSED:
            raise OSError(result, os.strerror(result))


def signal_the_audit() -> None:
    os.kill(AUDIT, 0)


def fork() -> None:
    if not (child := os.fork()):
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def become_root() -> None:
    os.setresuid(0, 0, 0)


def read_the_audits_memory() -> None:
    os.close(os.open(f"/proc/{AUDIT}/mem", os.O_RDONLY))


ATTEMPTS: dict[str, Callable[[], None]] = {
    attempt.__name__: attempt
    for attempt in (
        read_a_file,
        connect,
        signal_the_audit,
        fork,
        become_root,
        read_the_audits_memory,
    )
}
AUDIT = os.getppid()


def main() -> int:
    name, layers = sys.argv[1:3]
    del sys.argv[1:3]

    def instead(_: object) -> dict[str, str]:
        try:
            ATTEMPTS[name]()
        except OSError as error:
            return {"error": errno.errorcode[error.errno or 0]}
        return {"error": "done"}

    client.shake_hands = instead
    if layers == "no filter":
        client.seccomp.install = lambda _: None  # type: ignore[assignment]
    elif layers == "none":
        client._confine = lambda *_: None
    return client.main()


if __name__ == "__main__":
    sys.exit(main())
