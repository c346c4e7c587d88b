"""The metrics server's life: confine itself, then answer clients, until the supervisor hangs up.

Started by the supervisor, as root, if there is an address for the metrics; it serves as a uid of
its own. It is the process that hears whoever can connect there, so what it may do is taken away
first. It trusts the supervisor, which gives it the listening socket and each text.
"""

import json
import os
import socket
import sys
from typing import NoReturn

from keyd.linux import seccomp
from keyd.linux.descriptors import inherited_descriptors
from keyd.linux.sealed import read_all
from keyd.linux.title import set_title
from titus_py.between.event_loop import EventLoop
from titus_py.between.metrics_text import WANTED, receive_text
from titus_py.between.unprivileged import ALIVE, READY
from titus_py.metrics.confinement import confine
from titus_py.metrics.server import MetricsServer

__all__ = ["main"]


def main() -> int:
    """``python -m titus_py.metrics.life``: started by the supervisor, on inherited descriptors."""
    given = inherited_descriptors(sys.argv[1:])
    set_title("titus-metrics", "titus-py: metrics")
    settings = json.loads(read_all(given["--settings-fd"]))
    supervisor = socket.socket(fileno=given["--supervisor-fd"])
    listener = socket.socket(fileno=given["--listener-fd"])
    for one in (supervisor, listener):
        one.set_inheritable(False)
    loop = EventLoop()
    server = MetricsServer(loop, listener, lambda: _say(supervisor, WANTED))
    confine(settings["uid"], settings["chroot"], seccomp.Program(bytes.fromhex(settings["filter"])))
    sys.excepthook = _end
    _say(supervisor, READY)

    def be_alive() -> None:
        _say(supervisor, ALIVE)
        loop.after(settings["alive_seconds"], be_alive)

    def hear() -> None:
        text = receive_text(supervisor)
        if text is None:
            os._exit(0)
        server.take(text)

    loop.watch(supervisor.fileno(), hear)
    loop.after(settings["alive_seconds"], be_alive)
    while True:
        loop.run_once()


def _end(*unforeseen: object) -> NoReturn:
    """Nobody would read why: standard error is /dev/null by now.

    For a traceback, Python would open its source files. The filter would kill this process for it,
    as one that was taken over.
    """
    del unforeseen
    os._exit(1)


def _say(supervisor: socket.socket, message: bytes) -> None:
    """Blocks while the supervisor hears nothing. Raises OSError if it has gone."""
    supervisor.send(message)


if __name__ == "__main__":
    sys.exit(main())
