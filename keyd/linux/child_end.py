"""How a child ends, for one who also has to notice the end of another process.

A descriptor of the child (pidfd_open(2)) says it at once. The machine may have none to give, for a
while: until there is one, whoever waits looks now and then. So it does once the child has ended for
its tracer only, which is to reap it first (ptrace(2)), and may be stopped.
"""

import os
import select
import socket
from contextlib import suppress

__all__ = ["ChildEnd"]


class ChildEnd:
    """``other`` is a socket, at whose far end somebody may end as well."""

    def __init__(self, child: int, other: socket.socket) -> None:
        self._child, self._other = child, other
        self._poll = select.poll()
        # For its end alone (POLLHUP): it may have said something that is not for us.
        self._poll.register(other, 0)
        self._pidfd: int | None = None
        self.other_has_ended = False

    def code(self, seconds: float) -> int | None:
        """The child's exit code, or minus a signal's number; once, as the child is reaped.

        None if it has not ended within this time, or the other one has ended before. None comes
        early, and once, if it has ended for its tracer only.
        """
        if self._pidfd is None:
            # ENFILE, EMFILE, ENOMEM: that may pass.
            with suppress(OSError):
                self._pidfd = os.pidfd_open(self._child)
                self._poll.register(self._pidfd, select.POLLIN)
        found = dict(self._poll.poll(seconds * 1000))
        if self._other.fileno() in found:
            self.other_has_ended = True
            self._poll.unregister(self._other)
        ended, status = os.waitpid(self._child, os.WNOHANG)
        if not ended or os.WIFSTOPPED(status):
            # One that this process traces itself is heard of also when it stops.
            if self._pidfd in found:
                self._poll.unregister(self._pidfd)
            return None
        if self._pidfd is not None:
            os.close(self._pidfd)
        return os.waitstatus_to_exitcode(status)
