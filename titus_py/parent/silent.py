"""Clients that have connected and not said enough yet: they have no worker. Run by the parent.

Port scanners and health checks are among them, and whoever only wants connections to be used up.
What has come is looked at in the socket, for its lengths alone (``first_flight``), until there is a
whole ClientHello, or octets that cannot become one. No worker has the connection by then: what is
seen here, none can have changed.
"""

import select
import socket
import time
from collections.abc import Callable

from titus_py.between.event_loop import READABLE, EventLoop, Timer
from titus_py.parent.arrival import Arrival
from titus_py.parent.first_flight import FirstFlight, look

__all__ = ["Silent"]

#: How often to look at least, while there is anybody: one of them may have less time than others.
_LOOK_SECONDS = 1.0
#: As many octets as a ClientHello usually has, and some more.
_USUAL_OCTETS = 4096
#: More than a load balancer's header and a ClientHello can have, at their longest.
_MOST_OCTETS = 256 * 1024
#: How often to be woken for one client. Then it is looked at after a pause, each twice as long as
#: the one before: a ClientHello may come in hundreds of records, one by one.
_WOKEN_AT_MOST = 8
_PAUSE_SECONDS = 0.1


class _Silent:
    """One of them, and what it takes to look at it again."""

    __slots__ = ("after_header", "arrival", "needs", "pause", "timer", "unix", "watched", "woken")

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival
        #: Whether it is on a unix socket. There, epoll(7) does not heed SO_RCVLOWAT, and what
        #: nobody has read fills the sender's buffer: a few hundred pieces, however small.
        self.unix = arrival.client.family == socket.AF_UNIX
        #: How many octets have to be there for the next look.
        self.needs = 1
        #: Whether a load balancer's header has come, or none is to come.
        self.after_header = not arrival.proxy_timeout
        #: Whether the loop calls when there is something to look at.
        self.watched = False
        self.woken = 0
        self.pause = _PAUSE_SECONDS
        #: Runs while there is a pause.
        self.timer: Timer | None = None


class Silent:
    """``spoke`` is called with a client that has said all that a worker waits for first, and
    ``over`` with one that has left or has taken too long, and why. It is no longer here then.
    ``before_tls`` is for clients that first ask for TLS (``starttls``).
    """

    def __init__(
        self,
        loop: EventLoop,
        seconds: float,
        spoke: Callable[[Arrival], None],
        over: Callable[[Arrival, str], None],
        before_tls: Callable[[socket.SocketType, bytes], tuple[FirstFlight, bool]] | None = None,
    ) -> None:
        self._loop = loop
        self._before_tls = before_tls
        self._seconds = seconds
        self._spoke = spoke
        self._over = over
        #: By descriptor. The client that came first is first.
        self._silent: dict[int, _Silent] = {}
        self._timer: Timer | None = None

    def __len__(self) -> int:
        return len(self._silent)

    def add(self, arrival: Arrival) -> None:
        """Wait for this client, unless it has spoken already."""
        descriptor = arrival.client.fileno()
        silent = self._silent[descriptor] = _Silent(arrival)
        # Most have spoken by now: to watch those would be two system calls for nothing.
        if not self._look(descriptor):
            return
        self._watch(descriptor, silent)
        if self._timer is None:
            self._look_after(self._patience(silent))

    def oldest(self) -> Arrival | None:
        """Who came first, if anybody is here."""
        return next((one.arrival for one in self._silent.values()), None)

    def newest(self) -> Arrival | None:
        """Who came last, if anybody is here."""
        return next((one.arrival for one in reversed(self._silent.values())), None)

    def pop_oldest(self) -> Arrival:
        """Who came first, and is not here any more."""
        return self._take(next(iter(self._silent)))

    def oldest_stays(self) -> bool:
        """Look now at who came first; returns whether it has still not said enough."""
        return self._look(next(iter(self._silent)))

    def _watch(self, descriptor: int, silent: _Silent) -> None:
        # On a unix socket, the loop calls for each piece that comes.
        events = READABLE | select.EPOLLET if silent.unix else READABLE
        try:
            self._loop.watch(descriptor, lambda: self._hear(descriptor), events)
            silent.watched = True
        except OSError:
            # No watch is left for it, or no memory.
            self._look_later(descriptor, silent)

    def _unwatch(self, descriptor: int, silent: _Silent) -> None:
        if silent.watched:
            self._loop.unwatch(descriptor)
            silent.watched = False

    def _take(self, descriptor: int) -> Arrival:
        silent = self._silent.pop(descriptor)
        self._unwatch(descriptor, silent)
        if silent.timer is not None:
            silent.timer.cancel()
        if silent.needs > 1 and not silent.unix:
            silent.arrival.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        return silent.arrival

    def _hear(self, descriptor: int) -> None:
        silent = self._silent[descriptor]
        silent.woken += 1
        if self._look(descriptor) and silent.woken >= _WOKEN_AT_MOST:
            self._unwatch(descriptor, silent)
            self._look_later(descriptor, silent)

    def _look_later(self, descriptor: int, silent: _Silent) -> None:
        silent.timer = self._loop.after(silent.pause, lambda: self._go_on(descriptor))
        silent.pause *= 2

    def _go_on(self, descriptor: int) -> None:
        silent = self._silent[descriptor]
        silent.timer = None
        if self._look(descriptor):
            self._watch(descriptor, silent)

    def _look(self, descriptor: int) -> bool:
        """Look at what has come; returns whether the client is still to be waited for."""
        silent = self._silent[descriptor]
        client = silent.arrival.client
        try:
            most = _USUAL_OCTETS if silent.needs <= _USUAL_OCTETS else _MOST_OCTETS
            octets = client.recv(most, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            octets = b""
        if not octets:
            self._over(self._take(descriptor), "client_left")
            return False
        try:
            flight = self._said(silent, octets)
        except OSError:
            # It asked for TLS, and has left.
            self._over(self._take(descriptor), "client_left")
            return False
        # Who has left after a beginning is for a worker, which says so.
        if flight.needs and not _has_left(client):
            silent.after_header = flight.after_header or silent.after_header
            if flight.needs != silent.needs:
                silent.needs = flight.needs
                if silent.unix:
                    # This piece may have more than was asked for. The loop calls for the next one.
                    return len(octets) < most or self._look(descriptor)
                _make_room(client, silent.needs)
                # The loop is woken once they are there.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, silent.needs)
            return True
        arrival = self._take(descriptor)
        self._spoke(arrival._replace(since=time.monotonic(), client_hello=flight.client_hello))
        return False

    def _said(self, silent: _Silent, octets: bytes) -> FirstFlight:
        """What can be said of these octets; a client that asks for TLS is answered."""
        arrival = silent.arrival
        # Nothing is taken out of a unix socket, whatever the configuration says: a descriptor may
        # come with it, and closing that waits for as long as the client likes.
        if self._before_tls is None or not arrival.starttls or silent.unix:
            return look(octets, arrival.proxy_timeout > 0)
        flight, may_ask = self._before_tls(arrival.client, octets)
        silent.arrival = arrival._replace(starttls=may_ask)
        return flight

    def _patience(self, silent: _Silent) -> float:
        """For how many seconds it may take: a load balancer has its own time for a header."""
        return self._seconds if silent.after_header else silent.arrival.proxy_timeout / 1000

    def _end_overdue(self) -> None:
        now = time.monotonic()
        left: list[float] = []
        for descriptor, silent in list(self._silent.items()):
            seconds = silent.arrival.since + self._patience(silent) - now
            if seconds > 0:
                left.append(seconds)
                continue
            end = "handshake_timeout" if silent.after_header else "proxy_timeout"
            self._over(self._take(descriptor), end)
        self._timer = None
        if left:
            self._look_after(min(left))

    def _look_after(self, seconds: float) -> None:
        self._timer = self._loop.after(min(seconds, _LOOK_SECONDS), self._end_overdue)


def _make_room(client: socket.SocketType, octets: int) -> None:
    """Have the kernel keep so many unread. About half of a receive buffer is for octets."""
    for option in (socket.SO_RCVLOWAT, socket.SO_RCVBUF):
        # The first suffices, but for a listening socket whose buffer has been set (systemd.socket).
        if client.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < 2 * octets:
            client.setsockopt(socket.SOL_SOCKET, option, _MOST_OCTETS)


def _has_left(client: socket.SocketType) -> bool:
    """Whether this client has ended its stream, or the connection."""
    poll = select.poll()
    # POLLHUP and POLLERR are reported unasked.
    poll.register(client, select.POLLRDHUP)
    return bool(poll.poll(0))
