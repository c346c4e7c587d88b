"""Clients before they have a worker: accepting, waiting, turning away. Run by the parent.

Nothing is read from a client here. Its address decides, and whether its ClientHello has come.
"""

import select
import socket
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from titus_py.between.event_loop import READABLE, EventLoop, Timer
from titus_py.between.messages import Ends
from titus_py.between.plan import Plan
from titus_py.parent.admission import Admission, LimitsHit
from titus_py.parent.arrival import Arrival
from titus_py.parent.backends import Backends
from titus_py.parent.connections import Connections
from titus_py.parent.outbox import Tell
from titus_py.parent.silent import Silent
from titus_py.parent.sock_diag import not_available
from titus_py.parent.unserved import Unserved
from titus_py.parent.worker import Worker

if TYPE_CHECKING:
    from titus_py.parent.first_flight import FirstFlight
    from titus_py.parent.networks import Networks
    from titus_py.parent.tunnels import Tunnels

__all__ = ["Arrivals"]

#: How many clients to accept in a row from one listening socket before anything else is served.
_ACCEPT_AT_ONCE = 256
#: When accept(2) fails for want of a descriptor or of memory: how long to leave clients in the
#: listen queue, and how often to log it.
_PAUSE_SECONDS, _TELL_SECONDS = 0.1, 1.0
#: How long to wait before looking again for a connection that can give way to a newcomer; and for
#: the end of one that does. SIGKILL ends none that is in uninterruptible sleep.
_NOBODY_SECONDS, _LEAVING_SECONDS = 1.0, 5.0
#: For how long a silent client is waited for, where others need its place or keyd is to leave: an
#: honest one speaks as soon as it knows that it is connected.
_SILENCE_SECONDS = 0.25
#: A listening socket is watched for nothing. If another process has shut it down, epoll(7) tells so
#: whatever it is watched for, but by its edge only once.
_DEAF = select.EPOLLET
#: How long after there is room again to look once more: if there still is, that is logged.
_NOT_FULL_SECONDS = 1.0


class Arrivals:
    """The listening sockets, and the queue of clients that wait for a worker."""

    def __init__(
        self,
        loop: EventLoop,
        plan: Plan,
        waiting: deque[Arrival],
        connections: Connections,
        backends: Backends,
        admission: Admission,
        limits_hit: LimitsHit,
        tell: Tell,
    ) -> None:
        self._loop = loop
        self._plan = plan
        #: The client that came last is last.
        self._waiting = waiting
        #: Those that are not waiting yet.
        before_tls = _before_tls(plan)
        self.silent = Silent(loop, plan.handshake_timeout, self._wait, self._over, before_tls)
        self._connections = connections
        self._unserved = Unserved(loop, connections, tell)
        self._admission = admission
        self._limits_hit = limits_hit
        self._tell = tell
        self._listeners = {
            listener.descriptor: socket.socket(fileno=listener.descriptor)
            for listener in plan.listeners
        }
        #: Where load balancers are, and how many ms they have for a header; by descriptor.
        self._balancers: dict[int, tuple[Networks, int]] = {}
        if any(listener.accept_proxy_from for listener in plan.listeners):
            # Others do not need it in their memory.
            from titus_py.parent.networks import balancers

            self._balancers = balancers(plan.listeners)
        #: Clients whose tunnel's server is being connected to.
        self.tunnels = _tunnels(loop, plan, backends, connections, self._wait, self._turn_away)
        #: Listeners whose clients first ask for TLS, by descriptor.
        self._starttls = {one.descriptor for one in plan.listeners if one.starttls}
        self._tunnel_of = {
            listener.descriptor: listener.tunnel
            for listener in plan.listeners
            if listener.tunnel is not None
        }
        self._close: Callable[[socket.SocketType], None] = socket.SocketType.close
        #: Listeners whose clients have no address, by descriptor.
        self._unix = {one.descriptor for one in plan.listeners if one.unix}
        if self._unix or (plan.tunnels and plan.connects_to_unix_sockets):
            # Others do not need it in their memory.
            from titus_py.parent.unix_clients import close_at_once, unix_ends

            self._unix_ends, self._close = unix_ends, close_at_once
        for descriptor, listener in self._listeners.items():
            listener.setblocking(False)
            # Nobody is heard yet. Later there may be no watch left.
            loop.watch(descriptor, self._make_way, _DEAF)
        #: Whether newcomers are accepted, or only noticed because there is no room; else None.
        self._accepting: bool | None = None
        #: Whose end is awaited, for a newcomer's sake, and until when.
        self._leaving: Worker | None = None
        self._leaving_until = 0.0
        #: Runs for a while after no connection could give way.
        self._nobody: Timer | None = None
        self._not_available_told = False
        #: Runs until a client has been silent for so long.
        self._silence: Timer | None = None
        self._pause: Timer | None = None
        self._failure_told = -_TELL_SECONDS
        self._full_told = False
        self._full_timer: Timer | None = None
        self._waiting_timer: Timer | None = None

    @property
    def unready(self) -> int:
        """How many clients have been accepted that do not wait for a worker yet."""
        return len(self.silent) + (len(self.tunnels) if self.tunnels is not None else 0)

    def adjust(self, may_accept: bool) -> None:
        """Accept clients only while there is, or soon will be, a worker for them."""
        full = len(self._connections.busy) >= self._plan.max_workers
        if full and not self._full_told:
            self._full_told = True
            self._tell("full", level="warning", max=self._plan.max_workers)
        elif self._full_told and not full and self._full_timer is None:
            self._full_timer = self._loop.after(_NOT_FULL_SECONDS, self._no_longer_full)
        wanted = self._wanted() if may_accept and self._pause is None else None
        if wanted is self._accepting:
            return
        self._accepting = wanted
        for descriptor, listener in self._listeners.items():
            if wanted:
                balancers, timeout = self._balancers.get(descriptor, (None, 0))
                tunnel = self._tunnel_of.get(descriptor)
                accept = partial(self._accept, listener, balancers, timeout, tunnel)
                self._loop.rewatch(descriptor, accept)
            else:
                self._loop.rewatch(
                    descriptor, self._make_way, _DEAF if wanted is None else READABLE
                )

    def _wanted(self) -> bool | None:
        """Accept if there is room, or a client has been silent for too long.

        If not, and nobody is leaving, notice who comes. This is asked every few seconds at least.
        """
        if self._has_room():
            self._leaving = None
            return True
        oldest = self.silent.oldest()
        if oldest is not None and not self._may_still_speak(oldest):
            return True
        leaving = self._leaving
        if (
            leaving is not None
            and self._connections.busy.get(leaving.uid) is leaving
            and time.monotonic() < self._leaving_until
        ):
            return None
        return False if self._nobody is None else None

    def somebody_may_speak(self) -> bool:
        """Whether somebody who was accepted may be about to speak. The loop wakes up when not."""
        newest = self.silent.newest()
        return newest is not None and self._may_still_speak(newest)

    def _may_still_speak(self, silent: Arrival) -> bool:
        left = silent.since + _SILENCE_SECONDS - time.monotonic()
        if left > 0 and self._silence is None:
            self._silence = self._loop.after(left, self._silent_long_enough)
        return left > 0

    def _silent_long_enough(self) -> None:
        """Whoever asked asks again, after this round of the loop."""
        self._silence = None

    def close(self) -> None:
        """Stop accepting for good: another generation takes the new clients."""
        self._accepting = None
        for descriptor, listener in self._listeners.items():
            self._loop.unwatch(descriptor)
            self._close(listener)
        self._listeners.clear()

    def keep(self, count: int) -> None:
        """Reset the clients that are silent, and have waited longest, until ``count`` are left."""
        while self.tunnels and len(self._waiting) + self.unready > count:
            self.tunnels.turn_oldest_away()
        while self.silent and len(self._waiting) + len(self.silent) > count:
            self._turn_away(self.silent.pop_oldest())
        while len(self._waiting) > count:
            self._turn_away(self._waiting.popleft())

    def say_last(self) -> None:
        """Report, before the parent ends, what has not been reported yet."""
        self._unserved.say_last()

    def _no_longer_full(self) -> None:
        """Report room only if it is still there: connections may come and go at the maximum."""
        self._full_timer = None
        if len(self._connections.busy) < self._plan.max_workers:
            self._full_told = False
            self._tell("not_full", level="warning", max=self._plan.max_workers)

    def _has_room(self) -> bool:
        """Beyond the maximum, clients wait in the listen queue."""
        accepted = len(self._connections.busy) + len(self._waiting) + self.unready
        return accepted < self._plan.max_workers

    def _accept(
        self,
        listener: socket.SocketType,
        balancers: "Networks | None",
        proxy_timeout: int,
        tunnel: int | None,
    ) -> None:
        """Accept the clients in the listen queue, without waiting for workers to be forked.

        If there are ``balancers``, nobody else may connect. Their clients' addresses come later:
        here only the rate is limited.
        """
        unix = listener.fileno() in self._unix
        for _ in range(_ACCEPT_AT_ONCE):
            if not self._has_room() and not self._has_silent_one():
                return
            try:
                client, address = _accepted(listener)
                # For the worker, which gets it like this and cannot change it.
                client.setblocking(False)
                ends = self._unix_ends(client) if unix else _ends(client, address)
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                # EMFILE, ENFILE, ENOBUFS, ENOMEM: the client stays in the listen queue, and would
                # wake this loop without end.
                self._rest(error)
                return
            host = ends.client
            if balancers is None:
                limit = self._admission.refuse(host)
            elif host in balancers:
                limit = self._admission.refuse_rate()
            else:
                limit = "accept_proxy_from"
            if limit is None:
                self._welcome(
                    Arrival(
                        client,
                        *ends,
                        time.monotonic(),
                        proxy_timeout,
                        tunnel=tunnel,
                        starttls=listener.fileno() in self._starttls,
                    )
                )
            else:
                self._close(client)
                self._limits_hit.note(limit, host)

    def _make_way(self) -> None:
        """Somebody has come, and there is no room: have an idle connection give way, if any is."""
        if self._wanted() is not False:
            # Another listening socket has been heard in the same round.
            return
        self._leaving = None
        try:
            self._leaving = self._connections.give_way(len(self._waiting) + self.unready)
        except OSError as error:
            if not self._not_available_told:
                self._not_available_told = True
                self._tell("not_available", level="warning", feature=not_available(error))
        self._leaving_until = time.monotonic() + _LEAVING_SECONDS
        if self._leaving is None:
            self._nobody = self._loop.after(_NOBODY_SECONDS, self._look_again)

    def _look_again(self) -> None:
        """``adjust``, which is called next, notices newcomers again."""
        self._nobody = None

    def _rest(self, error: OSError) -> None:
        """Pause accepting. When the pause is over, a connection may have ended."""
        now = time.monotonic()
        if now - self._failure_told >= _TELL_SECONDS:
            self._failure_told = now
            self._tell("accept_failed", level="error", reason=error.strerror)
        if self._pause is None:
            self._pause = self._loop.after(_PAUSE_SECONDS, self._go_on)

    def _go_on(self) -> None:
        """End the pause. ``adjust``, which is called next, watches the listening sockets again."""
        self._pause = None

    def _welcome(self, arrival: Arrival) -> None:
        """Queue a client for a worker once its ClientHello is there: a worker costs a process.

        If there is no room, the client goes that has been silent for longest. A tunnel's client may
        leave the first word to its server.
        """
        if not self._has_room():
            oldest = self.silent.pop_oldest()
            self._turn_away(oldest)
            self._limits_hit.note("silent", oldest.address)
        if self.tunnels is not None and arrival.tunnel is not None:
            self.tunnels.dial(arrival, arrival.tunnel)
        else:
            self.silent.add(arrival)

    def _has_silent_one(self) -> bool:
        """Whether somebody has been silent for too long. Who has spoken meanwhile is heard now."""
        too_long_ago = time.monotonic() - _SILENCE_SECONDS
        while (oldest := self.silent.oldest()) is not None and oldest.since <= too_long_ago:
            if self.silent.oldest_stays():
                return True
        return False

    def _over(self, arrival: Arrival, end: str) -> None:
        """A client has left, or has been silent for too long."""
        self._turn_away(arrival)
        self._unserved.over(arrival, end)

    def _wait(self, arrival: Arrival) -> None:
        """Queue a client for a worker. If too many wait, reset the one that has waited longest.

        Clients in their handshake count as well, but are not reset here. A handshake is ended
        only when another client gets a worker, and so no faster than workers are forked.
        """
        self._waiting.append(arrival)
        room = self._plan.limits.handshakes - len(self._connections.handshaking)
        if len(self._waiting) > max(room, self._plan.spare_workers):
            oldest = self._waiting.popleft()
            self._turn_away(oldest)
            self._limits_hit.note("handshakes", oldest.address)
        if self._waiting_timer is None:
            self._waiting_timer = self._loop.after(
                self._plan.handshake_timeout, self._end_long_waits
            )

    def _turn_away(self, arrival: Arrival) -> None:
        """Reset a connection that has no worker yet."""
        self._close(arrival.client)
        if arrival.server is not None:
            self._close(arrival.server)
        if not arrival.proxy_timeout:
            self._admission.leave(arrival.address)

    def _end_long_waits(self) -> None:
        """Reset clients whose handshake can no longer finish in time (keyd may be down)."""
        self._waiting_timer = None
        long_ago = time.monotonic() - self._plan.handshake_timeout
        while self._waiting and self._waiting[0].since <= long_ago:
            late = self._waiting.popleft()
            self._turn_away(late)
            self._limits_hit.note("handshake_timeout", late.address)
        if self._waiting:
            self._waiting_timer = self._loop.after(
                self._waiting[0].since - long_ago, self._end_long_waits
            )


def _before_tls(
    plan: Plan,
) -> Callable[[socket.SocketType, bytes], tuple["FirstFlight", bool]] | None:
    if not any(listener.starttls for listener in plan.listeners):
        return None
    # Others do not need it in their memory.
    from titus_py.parent.starttls import look_before_tls

    return look_before_tls


def _tunnels(
    loop: EventLoop,
    plan: Plan,
    backends: Backends,
    connections: Connections,
    connected: Callable[[Arrival], None],
    turn_away: Callable[[Arrival], None],
) -> "Tunnels | None":
    if not plan.tunnels:
        return None
    # Others do not need it in their memory.
    from titus_py.parent.tunnels import Tunnels

    return Tunnels(loop, plan, backends, connections, connected, turn_away)


def _accepted(listener: socket.SocketType) -> tuple[socket.SocketType, tuple[str, int]]:
    """accept(2). Python's own way asks enumerations about each socket, in a dozen calls."""
    descriptor, address = listener._accept()  # type: ignore[attr-defined]
    return socket.SocketType(type=socket.SOCK_STREAM, proto=0, fileno=descriptor), address


def _ends(client: socket.SocketType, address: tuple[str, int]) -> Ends:
    local = client.getsockname()
    return Ends(_plain(address[0]), address[1], _plain(local[0]), local[1])


def _plain(address: str) -> str:
    """An IPv4 client of a dual-stack socket, by its own address (RFC 4291 §2.5.5.2)."""
    return address.removeprefix("::ffff:") if "." in address else address
