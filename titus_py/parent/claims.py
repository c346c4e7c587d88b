"""Whom a parent serves, as workers claim: for ``titus-py reload --cut``.

Run by the parent of an earlier generation, when the supervisor asks. Imported only then.
"""

import json
from collections.abc import Collection

from titus_py.parent.connections import Connections
from titus_py.parent.outbox import Tell

__all__ = ["cut", "tell_claims"]

#: How much of a message to fill with claims before the last one: together with that one, which
#: may hold 8 KiB of names, six characters for each octet, it stays below 64 KiB.
_BATCH_CHARACTERS = 12 * 1024


def tell_claims(connections: Connections, vhosts: Collection[int], tell: Tell) -> None:
    """Tell the supervisor the connections of these virtual hosts, and who their clients are.

    Clients that are within their handshake are reset: they connect again, and are then judged by
    the new configuration. So no connection of these virtual hosts begins after this.
    """
    for worker in list(connections.handshaking.values()):
        if worker.offer is not None and not set(vhosts).isdisjoint(worker.offer.vhosts):
            worker.kill("reloaded within its handshake")
    batch: list[object] = []
    characters = count = 0
    for worker in connections.busy.values():
        if worker.vhost in vhosts and not worker.killed_for:
            identity = worker.identity
            claim = [worker.connection, worker.vhost, identity and identity.claim()]
            batch.append(claim)
            count += 1
            characters += len(json.dumps(claim))
            if characters > _BATCH_CHARACTERS:
                tell("claims", claims=batch)
                batch, characters = [], 0
    tell("claims", claims=batch)
    tell("claims_told", count=count)


def cut(connections: Connections, numbers: Collection[int]) -> None:
    """End these connections: the new configuration does not allow them."""
    unwanted = set(numbers)
    for worker in list(connections.busy.values()):
        if worker.connection in unwanted:
            worker.kill("no_longer_allowed")
