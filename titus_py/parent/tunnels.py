"""Tunnels: connecting to the server for a client that has been accepted, before it has a worker.

Run by the parent, and loaded only where the configuration has a tunnel. A client whose server
cannot be reached need not cost a process: its connection is reset as soon as that is known. A
worker gets the client's socket and the server's together, and connects to nothing.
"""

import socket
import time
from collections.abc import Callable, Collection
from functools import partial

from keyd.protocol import ANY_NAME, Grant, GrantSet, Power
from titus_py.between.event_loop import EventLoop
from titus_py.between.plan import Plan
from titus_py.between.tunnel_terms import TunnelTerms
from titus_py.parent.arrival import Arrival
from titus_py.parent.backend import Backend
from titus_py.parent.backends import Backends
from titus_py.parent.connections import Connections
from titus_py.parent.failover import Failover
from titus_py.parent.worker import Offer

__all__ = ["Tunnels"]

#: How often connections are ended whose tunnel's time is over: one may only have begun.
_AGAIN_SECONDS = 1.0
#: Sets of grants have numbers (``GrantSet``): those of virtual hosts count from 0.
_FIRST_SET = 1 << 31


class Tunnels:
    """``connected`` is called with a client whose server is connected: it may have a worker.

    ``turn_away`` resets one that has no server. Either is no longer here then.
    """

    def __init__(
        self,
        loop: EventLoop,
        plan: Plan,
        backends: Backends,
        connections: Connections,
        connected: Callable[[Arrival], None],
        turn_away: Callable[[Arrival], None],
    ) -> None:
        self._loop = loop
        self._tunnels = plan.tunnels
        self._keepalive = plan.limits.keepalive
        self._balances = [backends.balance(one.balance, one.connect) for one in plan.tunnels]
        self._connections = connections
        self._connected = connected
        self._turn_away = turn_away
        self._offers = [
            Offer((), GrantSet(_FIRST_SET + number, self._grants(one)))
            for number, one in enumerate(plan.tunnels)
        ]
        #: Those whose server is being connected to, by their sockets. Who came first is first.
        self._dialing: dict[socket.SocketType, tuple[Arrival, Failover]] = {}
        self._of_keyd = [number for number, one in enumerate(plan.tunnels) if one.for_keyd]
        self._retired = False
        if any(one.send_proxy for one in plan.tunnels):
            # Others do not need it in their memory.
            from titus_py.parent.introduction import introduce

            self._introduce = introduce

    def __len__(self) -> int:
        return len(self._dialing)

    def _grants(self, tunnel: TunnelTerms) -> tuple[Grant, ...]:
        """What keyd may do for a tunnel: sign as a client, with its own key, if it has one."""
        if tunnel.certificate is None:
            return ()
        key = bytes.fromhex(tunnel.certificate.key)
        # A key is a server's or a client's. The check refuses such a configuration; whatever it
        # overlooks, keyd is to refuse.
        if self._connections.have_key(key):
            return ()
        return (Grant(0, ANY_NAME, key, frozenset({Power.SIGN_TLS13_CLIENT})),)

    def offer(self, number: int) -> Offer:
        """What keyd may do for a tunnel's connection."""
        return self._offers[number]

    def dial(self, arrival: Arrival, number: int) -> None:
        """Connect to the tunnel's server, without waiting for it."""
        tunnel = self._tunnels[number]
        backends = self._balances[number].order(arrival.address)
        done = partial(self._settled, arrival, tunnel)
        failover = Failover(self._loop, backends, tunnel.connect_timeout, self._keepalive, done)
        self._dialing[arrival.client] = arrival, failover
        failover.start()

    def turn_oldest_away(self) -> None:
        """Reset the client that has waited longest for its server."""
        arrival, failover = self._dialing.pop(next(iter(self._dialing)))
        failover.cancel()
        self._turn_away(arrival)

    def retire(self, somebody_waits: Callable[[], bool]) -> None:
        """Nobody is accepted any more: end each tunnel's connections once its ``drain`` is over.

        Those of keyd's own end with the last of all others, also those that wait for a worker.
        """
        if self._retired:
            return
        if self._of_keyd:
            self._end_of_keyd(somebody_waits)
        self._retired = True
        for number, tunnel in enumerate(self._tunnels):
            if tunnel.drain is not None:
                self._loop.after(tunnel.drain, partial(self._end, number))

    def cut(self, numbers: Collection[int]) -> None:
        """End the connections of these tunnels: the new configuration accepts less."""
        self._kill(numbers, "no_longer_allowed")

    def _kill(self, numbers: Collection[int], reason: str) -> None:
        for worker in list(self._connections.busy.values()):
            if worker.tunnel in numbers:
                worker.kill(reason)

    def _end_of_keyd(self, somebody_waits: Callable[[], bool]) -> None:
        busy = self._connections.busy.values()
        if not somebody_waits() and all(worker.tunnel in self._of_keyd for worker in busy):
            self._kill(self._of_keyd, "drained")
        self._loop.after(_AGAIN_SECONDS, lambda: self._end_of_keyd(somebody_waits))

    def _end(self, number: int) -> None:
        self._kill([number], "drained")
        self._loop.after(_AGAIN_SECONDS, partial(self._end, number))

    def _settled(
        self,
        arrival: Arrival,
        tunnel: TunnelTerms,
        server: socket.SocketType | None,
        backend: Backend | None,
        reason: str,
    ) -> None:
        del self._dialing[arrival.client]
        if server is not None and tunnel.send_proxy is not None:
            reason = self._introduce(server, tunnel.send_proxy, arrival.ends, None, None, None)
            if reason:
                arrival, server = arrival._replace(server=server), None
        if server is not None:
            now = time.monotonic()
            self._connected(arrival._replace(server=server, backend=backend, since=now))
            return
        self._turn_away(arrival)
        self._connections.over(arrival, "unreachable", "error", reason)
