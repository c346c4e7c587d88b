"""Keyd and the parent, as the supervisor's children: started, ordered, killed, buried.

Run by the supervisor. They are started with execve(2), so that each begins with a clean address
space. Beside its standard streams, each gets exactly the descriptors that its arguments and its
plan name.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress

from keyd.linux.descriptors import passes, send_descriptors
from keyd.linux.process import signals_held_back
from keyd.linux.sealed import sealed_file
from keyd.provider import openssl_configuration
from titus_py.between.event_loop import Timer
from titus_py.between.hand_over import KEYD_FD, PARENT_FD
from titus_py.between.plan import Plan
from titus_py.supervisor.reaping import end_unwatched, note, reap

__all__ = ["ALIVE_SECONDS", "Child", "start_keyd", "start_parent"]

#: How often the parent and keyd say that they are alive.
ALIVE_SECONDS = 3.0
#: The arguments with which Python starts each of them.
_KEYD = ("-m", "keyd", "serve")
_PARENT = ("-m", "titus_py.parent.life")
#: A setting that pyOpenSSL has no call for (SSL_CONF_cmd(3)). Without resumption, a TLS 1.3
#: ticket is of no use.
_TLS_COMMANDS = "NumTickets = 0"


class Child:
    """A process that the supervisor started, and the supervisor's end of their socket.

    ``process`` is only a pid if the supervisor's previous program started it (``succession``).
    """

    def __init__(
        self, name: str, process: "subprocess.Popen[bytes] | int", end: socket.socket
    ) -> None:
        self.name = name
        self.socket = end
        self.pid = process if isinstance(process, int) else process.pid
        note(self.pid)
        #: While the child is starting: the timer that kills it if that takes too long.
        self.patience: Timer | None = None
        self.pidfd = os.pidfd_open(self.pid)
        #: Whether ``Children`` hears it.
        self.watched = False
        self.started = self.last_heard = time.monotonic()
        #: Since when it serves.
        self.ready: float | None = None
        self._process = process
        #: Orders not sent yet, each with our own duplicates of its descriptors.
        self._orders: deque[tuple[bytes, list[int]]] = deque()

    @property
    def served(self) -> float:
        """For how many seconds it has served."""
        return 0.0 if self.ready is None else time.monotonic() - self.ready

    def queue(self, order: Mapping[str, object], descriptors: Sequence[int] = ()) -> bool:
        """Queue an order for ``send_orders``; returns whether no other one waits."""
        octets = json.dumps(order).encode()
        self._orders.append((octets, [os.dup(descriptor) for descriptor in descriptors]))
        return len(self._orders) == 1

    def send_orders(self) -> bool:
        """Send the orders that can be sent now, without waiting; returns whether that was all.

        A child that has gone or hangs is noticed elsewhere.
        """
        while self._orders:
            octets, descriptors = self._orders[0]
            try:
                send_descriptors(self.socket, octets, descriptors)
            except OSError as error:
                if passes(error):
                    return False
            self._drop_order()
        return True

    @property
    def has_heard_all(self) -> bool:
        """Whether no order waits to be sent."""
        return not self._orders

    def _drop_order(self) -> None:
        for descriptor in self._orders.popleft()[1]:
            os.close(descriptor)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def bury(self) -> str:
        """Reap the child and close its descriptors; returns how it ended, in words."""
        how = reap(self._process, self.pidfd)
        while self._orders:
            self._drop_order()
        os.close(self.pidfd)
        self.socket.close()
        return how


def start_keyd(
    settings: dict[str, object], predecessor: socket.socket | None
) -> tuple[Child, socket.socket]:
    """Start keyd; returns it and the parent's end of its control socket. Raises OSError.

    It gets the socket ``predecessor``.
    """
    with ExitStack() as given:
        if predecessor is not None:
            given.enter_context(predecessor)
        parents_end, keyds_end = _socketpair()
        given.enter_context(keyds_end)
        descriptors = {
            "settings-fd": _file(given, "keyd-settings", json.dumps(settings)),
            "parent-fd": keyds_end.fileno(),
        }
        if predecessor is not None:
            descriptors["predecessor-fd"] = predecessor.fileno()
        return _start("keyd", _KEYD, descriptors), parents_end


def start_parent(plan: Plan, keyd: socket.socket | None) -> Child:
    """Start the parent with this plan. It gets the socket ``keyd``. Raises OSError."""
    milliseconds = int(plan.handshake_timeout * 1000)
    channel = f"channel_fd = {KEYD_FD}\nnext_channel_fd = {PARENT_FD}\ntimeout_ms = {milliseconds}"
    openssl_conf = openssl_configuration(channel, _TLS_COMMANDS)
    with ExitStack() as given:
        for index in plan.indexes:
            given.callback(os.close, index)
        if keyd is not None:
            given.enter_context(keyd)
        descriptors = {
            "plan-fd": _file(given, "plan", plan.encode()),
            "openssl-conf-fd": _file(given, "openssl.cnf", openssl_conf),
        }
        if keyd is not None:
            descriptors["keyd-fd"] = keyd.fileno()
        sockets = [listener.descriptor for listener in plan.listeners]
        return _start("parent", _PARENT, descriptors, (*sockets, *plan.indexes))


def _file(given: ExitStack, name: str, content: str | bytes) -> int:
    """A descriptor of a sealed file, for as long as ``given`` is open. Raises OSError."""
    descriptor = sealed_file(name, content.encode() if isinstance(content, str) else content)
    given.callback(os.close, descriptor)
    return descriptor


def _start(
    name: str,
    program: Sequence[str],
    given: Mapping[str, int],
    shared: Sequence[int] = (),
) -> Child:
    """Start a Python program, which gets these descriptors. Raises OSError."""
    ours, theirs = _socketpair()
    ours.setblocking(False)
    given = {**given, "supervisor-fd": theirs.fileno()}
    arguments = [word for key, fd in given.items() for word in (f"--{key}", str(fd))]
    try:
        # Only the supervisor tells it to end, so it must not hear signals to the whole unit.
        with theirs, signals_held_back():
            process = subprocess.Popen(
                # -I (isolated): PYTHON* variables and the current directory are ignored.
                [sys.executable, "-I", *program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={},
                pass_fds=(*given.values(), *shared),
                # If a parent is killed, the processes that it leaves are known by its session.
                start_new_session=True,
            )
    except OSError:
        ours.close()
        raise
    try:
        return Child(name, process, ours)
    except OSError:
        # No descriptor is left to watch it by.
        ours.close()
        end_unwatched(process)
        raise


def _socketpair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
