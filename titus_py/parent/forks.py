"""The parent's side of its fork server: starting it, sending orders, receiving the results.

Run by the parent, which trusts the fork server and never waits for it once it has started.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from keyd.linux.descriptors import receive_descriptors, send_descriptors
from keyd.linux.process import how_ended
from titus_py.between.event_loop import EventLoop
from titus_py.between.messages import (
    FORK_SERVER_OCTETS,
    Fork,
    Forked,
    Leaving,
    Malformed,
    Prepared,
    decode_from_fork_server,
)
from titus_py.fork_server.confinement import MAX_ORDERS

__all__ = ["Forks"]

#: Python's arguments for the fork server: isolated (-I), but for its environment, which is ours.
_PROGRAM = ("-P", "-s", "-m", "titus_py.fork_server.life")
#: What the fork server and its workers allocate is in one piece, to be on huge pages. So Python
#: takes it from the C library's malloc (``huge_pages``). That keeps nothing that is freed where it
#: is, for the next one of its size: what a worker allocates lies together (``holes``).
MALLOC = {
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
    "PYTHONMALLOC": "malloc",
}
#: How long the fork server may answer no order before the parent takes it to hang.
_QUIET_SECONDS = 5.0


class Forks:
    """One fork server, started with the plan that the parent has.

    ``done`` is called with the result of each order and the worker's pidfd (-1 if there is
    none). ``lost`` is called once, with how the fork server ended and why, if it was not told to.
    """

    def __init__(self, plan_fd: int, openssl_conf_fd: int, indexes: Sequence[int] = ()) -> None:
        """Start it; takes the descriptors over, but for those of indexes. Raises OSError."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        given = {
            "plan-fd": plan_fd,
            "openssl-conf-fd": openssl_conf_fd,
            "parent-fd": theirs.detach(),
        }
        arguments = [word for key, fd in given.items() for word in (f"--{key}", str(fd))]
        try:
            self._process = subprocess.Popen(
                [sys.executable, *_PROGRAM, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={
                    "OPENSSL_CONF": f"/proc/self/fd/{openssl_conf_fd}",
                    # A symbol that is not bound at the start is bound anew by every worker.
                    "LD_BIND_NOW": "1",
                    # The locale's files would be two more mappings for each fork to copy.
                    "PYTHONCOERCECLOCALE": "0",
                    **MALLOC,
                },
                pass_fds=(*given.values(), *indexes),
            )
        finally:
            for descriptor in given.values():
                os.close(descriptor)
        self._pidfd = os.pidfd_open(self._process.pid)
        #: What it said when it was ready.
        self.prepared = Prepared(0, 0)
        self._orders = 0
        self._finishing = False
        #: Why it ends, where it has said so.
        self._why = ""
        #: When it last answered, or had nothing to do; and when ``look_after`` last ran.
        self._last_seen = self._looked = time.monotonic()

    def wait_until_ready(self) -> None:
        """Wait, before there is any client. Raises OSError if the fork server failed to start."""
        why = "see above"
        with suppress(Malformed):
            said = decode_from_fork_server(self._socket.recv(FORK_SERVER_OCTETS))
            if isinstance(said, Prepared):
                self.prepared = said
                return
            why = said.why if isinstance(said, Leaving) else why
        raise OSError(f"the fork server did not start: {why}")

    def watch(
        self, loop: EventLoop, done: Callable[[Forked, int], None], lost: Callable[[str], None]
    ) -> None:
        self._socket.setblocking(False)
        self._loop = loop
        self._done = done
        self._lost = lost
        loop.watch(self._socket.fileno(), self._hear)
        loop.watch(self._pidfd, self._ended)

    @property
    def busy(self) -> bool:
        """Whether it has as many orders as it is given at a time, or takes no more."""
        return self._orders >= MAX_ORDERS or self._finishing

    def order(self, uid: int, report: int, end: int) -> None:
        """Have a worker forked. Raises OSError."""
        if not self._orders:
            self._last_seen = time.monotonic()
        send_descriptors(self._socket, Fork(uid).encode(), [report, end])
        self._orders += 1

    def look_after(self) -> None:
        """Kill the fork server if it has had orders for too long and answered none: it hangs."""
        now = time.monotonic()
        # If this process itself was stopped (SIGSTOP, a paused virtual machine), the time since
        # the last answer says nothing.
        if now - self._looked > _QUIET_SECONDS:
            self._last_seen = now
        self._looked = now
        if self._orders and now - self._last_seen > _QUIET_SECONDS:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def finish(self) -> None:
        """Send no more orders. The fork server leaves when it has answered those that it has."""
        self._finishing = True
        if not self._orders:
            self._close()

    def _close(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()

    def _hear(self) -> None:
        while self._socket.fileno() >= 0:
            try:
                message, descriptors = receive_descriptors(self._socket, FORK_SERVER_OCTETS, 1)
            except BlockingIOError:
                return
            except ConnectionResetError:
                # It ended with orders unread. What it had sent can still be received.
                continue
            if not message:
                # It has ended, or is about to: its pidfd will tell.
                self._close()
                return
            try:
                said = decode_from_fork_server(message)
            except Malformed:
                said = None
            if isinstance(said, Leaving) and not (self._why or descriptors):
                self._why = f": {said.why}"
                continue
            if not isinstance(said, Forked) or not self._orders:
                # It is not our code that answers, or answers what was not ordered: end it.
                for descriptor in descriptors:
                    os.close(descriptor)
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                self._close()
                return
            self._orders -= 1
            self._last_seen = time.monotonic()
            self._done(said, descriptors[0] if descriptors else -1)
            if self._finishing and not self._orders:
                self._close()

    def _ended(self) -> None:
        self._hear()
        self._close()
        self._loop.unwatch(self._pidfd)
        os.close(self._pidfd)
        self._orders = 0
        finished, self._finishing = self._finishing, True
        code = self._process.poll()
        # Somebody may trace it, is to reap it first (ptrace(2)), and may be stopped.
        how = "ended for its tracer only" if code is None else how_ended(code)
        if not finished:
            self._lost(how + self._why)
