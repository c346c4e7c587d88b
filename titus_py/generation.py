"""A generation: one keyd and one parent, and the sockets between them.

Run by the supervisor. Both are started with execve(2), so that each begins with a
clean address space, and each gets exactly the descriptors that its arguments name.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from keyd.linux.sealed import sealed_file
from keyd.provider import openssl_configuration
from titus_py.confinement import KEYD_FD
from titus_py.plan import Plan

__all__ = ["Child", "start_keyd", "start_parent"]

#: What is started, as Python is to be told of it.
_KEYD = ("-m", "keyd", "serve")
_PARENT = ("-m", "titus_py.parent")
#: In the words of SSL_CONF_cmd(3), what pyOpenSSL has no call for: without resumption,
#: a TLS 1.3 ticket is of no use.
_TLS_COMMANDS = "NumTickets = 0"


class Child:
    """A process that the supervisor started, and its end of their socket."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", end: socket.socket) -> None:
        self.name = name
        self.socket = end
        self.pid = process.pid
        self.pidfd = os.pidfd_open(process.pid)
        self.started = time.monotonic()
        self._process = process

    def send(self, order: dict[str, object], descriptors: Sequence[int] = ()) -> None:
        """Tell it something; a child that is gone or stuck is noticed otherwise."""
        with suppress(OSError):
            socket.send_fds(self.socket, [json.dumps(order).encode()], descriptors)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def bury(self) -> str:
        """After its end: let go of it; returns how it ended, in words."""
        code = self._process.wait()
        os.close(self.pidfd)
        self.socket.close()
        return f"exited with {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def start_keyd(settings: dict[str, object]) -> tuple[Child, socket.socket]:
    """keyd, and the parent's end of its control socket. Raises OSError."""
    parents_end, keyds_end = _socketpair()
    settings_fd = sealed_file("keyd-settings", json.dumps(settings).encode())
    given = {"settings-fd": settings_fd, "parent-fd": keyds_end.detach()}
    return _start("keyd", _KEYD, given), parents_end


def start_parent(plan: Plan, keyd: socket.socket) -> Child:
    """The parent of this plan; the socket becomes the parent's. Raises OSError."""
    milliseconds = int(plan.handshake_timeout * 1000)
    channel = f"channel_fd = {KEYD_FD}\ntimeout_ms = {milliseconds}"
    configuration = openssl_configuration(channel, _TLS_COMMANDS)
    given = {
        "plan-fd": sealed_file("plan", plan.encode()),
        "openssl-conf-fd": sealed_file("openssl.cnf", configuration.encode()),
        "keyd-fd": keyd.detach(),
    }
    environment = {"OPENSSL_CONF": f"/proc/self/fd/{given['openssl-conf-fd']}"}
    return _start("parent", _PARENT, given, environment, plan.listeners)


def _start(
    name: str,
    program: Sequence[str],
    given: dict[str, int],
    environment: dict[str, str] | None = None,
    shared: Sequence[int] = (),
) -> Child:
    """Start a Python program. What it is given it alone holds from now on."""
    ours, theirs = _socketpair()
    ours.setblocking(False)
    given = given | {"supervisor-fd": theirs.detach()}
    arguments = [word for key, fd in given.items() for word in (f"--{key}", str(fd))]
    try:
        process = subprocess.Popen(
            # Isolated (-I): no PYTHON* variable and no current directory has a say.
            [sys.executable, "-I", *program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment or {},
            pass_fds=(*given.values(), *shared),
            # A session of its own: the terminal's Ctrl-C is for the supervisor.
            start_new_session=True,
        )
    finally:
        for descriptor in given.values():
            os.close(descriptor)
    return Child(name, process, ours)


def _socketpair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
