"""Closing unix sockets that nobody has read: without waiting for what has been put there.

Used by the parent and the supervisor where clients, or backends, are on unix sockets. They may send
descriptors (SCM_RIGHTS, unix(7)), unless the kernel refuses these (Linux 6.16). Whoever closes such
a socket last, or reads it, closes these, too. A TCP socket among them makes its own last holder
wait for as long as its SO_LINGER says (socket(7)): for hours, if the other end likes. A signal ends
that wait.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_waiting"]

#: How long such a wait may take, in seconds.
_MOST = 0.002


@contextmanager
def without_waiting() -> Iterator[None]:
    """Meanwhile, a signal comes every now and then. Used in the main thread alone."""
    signal.signal(signal.SIGALRM, _wake_up)
    # Again and again: the first one may come too early.
    before = signal.setitimer(signal.ITIMER_REAL, _MOST, _MOST)
    try:
        yield
    finally:
        # The supervisor may be within a wait that such a timer bounds already.
        signal.setitimer(signal.ITIMER_REAL, *before)


def _wake_up(*_: object) -> None:
    """That the signal came is enough."""
