"""Not waiting in close(2) for what a child has sent.

Run by the supervisor. Where octets are left that the peer does not take, the last process to close
a TCP socket waits for as long as its SO_LINGER says (socket(7)). An attacker who controls a child
can send such a socket's descriptor. Whoever receives it may be its last holder: also where it was
sent within another socket, or where the message had more descriptors than there was room for. A
signal ends the wait, so a timer sends signals.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["hear_alarms", "not_lingering"]

#: How long to wait for the first descriptor, and then for each further one.
_SECONDS, _FURTHER_SECONDS = 0.5, 0.001


def hear_alarms() -> None:
    """To be called by the main thread, before ``not_lingering``."""
    # An ignored signal would end no wait.
    signal.signal(signal.SIGALRM, lambda *_: None)


@contextmanager
def not_lingering() -> Iterator[None]:
    """Within, no close(2) and no recvmsg(2) waits for longer than ``_SECONDS``."""
    before = signal.setitimer(signal.ITIMER_REAL, _SECONDS, _FURTHER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
