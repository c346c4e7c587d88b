"""Who workers say that their clients are. Imported by the parent where a host asks for that.

An identity is the worker's claim: the parent sees to its form, and that one is made where a virtual
host requires a certificate. It does not see the certificate's handshake, and a worker that was
taken over can claim to have any.
"""

from typing import TYPE_CHECKING

from titus_py.between import messages
from titus_py.between.client_identity import MAX_IDENTITY_OCTETS, Identity
from titus_py.between.messages import Dial, Established, Proxied, Ready
from titus_py.between.plan import Plan
from titus_py.parent.worker import Worker

if TYPE_CHECKING:
    from titus_py.parent.known_clients import KnownClients

__all__ = ["Identities"]


class Identities:
    #: One more than the longest message, so that a longer one is noticed.
    MESSAGE_OCTETS = MAX_IDENTITY_OCTETS + 1

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._known = _known_clients(plan)

    def decode(self, message: bytes) -> Ready | Proxied | Dial | Established | Identity:
        """A worker's message; raises Malformed."""
        if message[:1] == b"I":
            return Identity.decode(message)
        return messages.decode_from_worker(message)

    def take(self, worker: Worker, message: object) -> bool:
        """Note an identity; returns False for anything else, and for one that cannot be."""
        if (
            not isinstance(message, Identity)
            or worker.offer is None
            or worker.identity is not None
            or worker.vhost is not None
            or all(self._plan.vhosts[vhost].clients is None for vhost in worker.offer.vhosts)
        ):
            return False
        worker.identity = message
        return True

    def allow(self, worker: Worker, vhost: int) -> bool:
        """Whether our code dials for this virtual host, with the identity it has claimed."""
        clients = self._plan.vhosts[vhost].clients
        if clients is None:
            return worker.identity is None
        if worker.identity is None:
            return not clients.required
        if not clients.known:
            return worker.known is None
        return worker.known is not None and worker.known < len(clients.known)

    def admit(self, worker: Worker) -> str | None:
        """The limit of its client that this worker would exceed, once it has dialled; or None."""
        return self._known.admit(worker) if self._known is not None else None

    def name_of(self, worker: Worker) -> str | None:
        """What its client is called, if its virtual host knows it."""
        client = self._known.client_of(worker) if self._known is not None else None
        return client and client.name

    def ended(self, worker: Worker) -> None:
        """Forget a worker that has ended."""
        if self._known is not None:
            self._known.leave(worker)


def _known_clients(plan: Plan) -> "KnownClients | None":
    if not any(vhost.clients is not None and vhost.clients.known for vhost in plan.vhosts):
        return None
    # Others do not need it in their memory.
    from titus_py.parent.known_clients import KnownClients

    return KnownClients(plan)
