"""Clients that have connected and said nothing yet: they have no worker. Run by the parent.

Port scanners and health checks are among them, and whoever only wants connections to be used up.
The kernel tells when octets have come, and whether the client has left; none is read here.
"""

import fcntl
import select
import struct
import termios
import time
from collections.abc import Callable

from titus_py.between.event_loop import EventLoop, Timer
from titus_py.parent.arrival import Arrival

__all__ = ["Silent", "has_spoken"]

_COUNT = struct.Struct("=i")
#: How often to look at least, while there is anybody: one of them may have less time than others.
_LOOK_SECONDS = 1.0


def has_spoken(arrival: Arrival) -> bool:
    """Whether octets of this client wait to be read (tcp(7), SIOCINQ)."""
    unread = fcntl.ioctl(arrival.client, termios.FIONREAD, bytes(_COUNT.size))
    return bool(_COUNT.unpack(unread)[0])


def _has_left(arrival: Arrival) -> bool:
    """Whether this client has ended its stream, or the connection."""
    poll = select.poll()
    # POLLHUP and POLLERR are reported unasked.
    poll.register(arrival.client, select.POLLRDHUP)
    return bool(poll.poll(0))


class Silent:
    """``spoke`` is called with a client that has, and ``over`` with one that has left or that has
    been silent for too long, and why. It is no longer here then.
    """

    def __init__(
        self,
        loop: EventLoop,
        seconds: float,
        spoke: Callable[[Arrival], None],
        over: Callable[[Arrival, str], None],
    ) -> None:
        self._loop = loop
        self._seconds = seconds
        self._spoke = spoke
        self._over = over
        #: By descriptor. The client that came first is first.
        self._arrivals: dict[int, Arrival] = {}
        self._timer: Timer | None = None

    def __len__(self) -> int:
        return len(self._arrivals)

    def add(self, arrival: Arrival) -> None:
        descriptor = arrival.client.fileno()
        self._arrivals[descriptor] = arrival
        self._loop.watch(descriptor, lambda: self._hear(descriptor))
        if self._timer is None:
            self._look_after(self._patience(arrival))

    def oldest(self) -> Arrival | None:
        """Who came first, if anybody is here."""
        return next(iter(self._arrivals.values()), None)

    def newest(self) -> Arrival | None:
        """Who came last, if anybody is here."""
        return next(reversed(self._arrivals.values()), None)

    def pop_oldest(self) -> Arrival:
        """Who came first, and is not here any more."""
        return self._take(next(iter(self._arrivals)))

    def hear_oldest(self) -> None:
        """Call back now for who came first, who has spoken or left."""
        self._hear(next(iter(self._arrivals)))

    def _take(self, descriptor: int) -> Arrival:
        self._loop.unwatch(descriptor)
        return self._arrivals.pop(descriptor)

    def _hear(self, descriptor: int) -> None:
        arrival = self._take(descriptor)
        if has_spoken(arrival) or not _has_left(arrival):
            # The kernel does not count urgent octets, nor what came within a SYN (RFC 7413) whose
            # handshake is not done.
            self._spoke(arrival._replace(since=time.monotonic()))
        else:
            self._over(arrival, "client_left")

    def _patience(self, arrival: Arrival) -> float:
        """For how many seconds it may be silent: a load balancer has its own time for a header."""
        return arrival.proxy_timeout / 1000 or self._seconds

    def _end_overdue(self) -> None:
        now = time.monotonic()
        left: list[float] = []
        for descriptor, arrival in list(self._arrivals.items()):
            seconds = arrival.since + self._patience(arrival) - now
            if seconds > 0:
                left.append(seconds)
                continue
            self._take(descriptor)
            self._over(arrival, "proxy_timeout" if arrival.proxy_timeout else "handshake_timeout")
        self._timer = None
        if left:
            self._look_after(min(left))

    def _look_after(self, seconds: float) -> None:
        self._timer = self._loop.after(min(seconds, _LOOK_SECONDS), self._end_overdue)
