"""How many connections known clients have, and how fast they come. Imported by the parent where a
virtual host knows clients one by one.

Which client a connection is of is its worker's claim. A worker that was taken over can claim to be
any of them, and use up what that one may have.
"""

import time
from collections import Counter
from collections.abc import Callable

from titus_py.between.known_client import KnownClient, Rate
from titus_py.between.plan import Plan
from titus_py.parent.worker import Worker

__all__ = ["KnownClients"]


class KnownClients:
    """By virtual host and client. The counts are this parent's own: a reload begins anew."""

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan = plan
        self._connections: Counter[tuple[int, int]] = Counter()
        #: Which client a worker is counted for, by the worker's uid.
        self._counted: dict[int, tuple[int, int]] = {}
        self._buckets = {
            (number, index): _Bucket(client.rate, clock)
            for number, vhost in enumerate(plan.vhosts)
            for index, client in enumerate(vhost.clients.known if vhost.clients else ())
            if client.rate is not None
        }

    def client_of(self, worker: Worker) -> KnownClient | None:
        """Who the worker says that its client is, of those that its virtual host knows."""
        if worker.vhost is None or worker.known is None:
            return None
        clients = self._plan.vhosts[worker.vhost].clients
        return clients.known[worker.known] if clients is not None else None

    def admit(self, worker: Worker) -> str | None:
        """Return the limit of its client that this worker would exceed. If none, count it."""
        client = self.client_of(worker)
        if client is None or worker.vhost is None or worker.known is None:
            return None
        key = worker.vhost, worker.known
        if client.connections is not None and self._connections[key] >= client.connections:
            return "client_connections"
        if key in self._buckets and not self._buckets[key].take():
            return "client_rate"
        self._connections[key] += 1
        self._counted[worker.uid] = key
        return None

    def leave(self, worker: Worker) -> None:
        """Stop counting a worker, if it was counted: it has ended."""
        key = self._counted.pop(worker.uid, None)
        if key is not None:
            self._connections[key] -= 1


class _Bucket:
    """A token bucket: it is refilled at a rate, and holds as many as the rate's time has."""

    def __init__(self, rate: Rate, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._tokens = float(rate.most)
        self._refilled = clock()

    def take(self) -> bool:
        now = self._clock()
        since = (now - self._refilled) * self._rate.most / self._rate.seconds
        self._tokens, self._refilled = min(self._rate.most, self._tokens + since), now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
