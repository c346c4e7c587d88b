"""Who workers say that their clients are. Imported by the parent where a host asks for that.

An identity is the worker's claim: the parent sees to its form, and that one is made where a virtual
host requires a certificate. It does not see the certificate's handshake, and a worker that was
taken over can claim to have any.
"""

from titus_py.between import messages
from titus_py.between.client_identity import MAX_IDENTITY_OCTETS, Identity
from titus_py.between.messages import Dial, Established, Proxied, Ready
from titus_py.between.plan import Plan
from titus_py.parent.worker import Worker

__all__ = ["Identities"]


class Identities:
    #: One more than the longest message, so that a longer one is noticed.
    MESSAGE_OCTETS = MAX_IDENTITY_OCTETS + 1

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

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
        return worker.identity is not None or not clients.required
