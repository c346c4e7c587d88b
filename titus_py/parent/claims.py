"""Whom a parent serves, as workers claim: for ``titus-py reload --cut``.

Run by the parent of an earlier generation, when the supervisor asks.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from titus_py.parent.connections import Connections
from titus_py.parent.outbox import Tell
from titus_py.parent.worker import Worker

__all__ = ["cut", "tell_claims"]

#: What is in a message besides the claims.
_BESIDE_THE_CLAIMS = 64


def tell_claims(
    connections: Connections, order: Mapping[str, Any], tell: Tell, most_octets: int
) -> None:
    """Tell the supervisor the connections of some virtual hosts, and who their clients are.

    No message is longer than ``most_octets``. Clients that are within their handshake are reset:
    they connect again, and are then judged by the new configuration. So no connection of these
    virtual hosts begins after this.
    """
    wanted = frozenset(order["vhosts"])
    # An earlier program's supervisor does not want to hear to what this is an answer.
    asked = {"asked": order["asked"]} if "asked" in order else {}
    for worker in list(connections.handshaking.values()):
        if worker.offer is not None and not wanted.isdisjoint(worker.offer.vhosts):
            worker.kill("reloaded within its handshake")
    room = most_octets - _BESIDE_THE_CLAIMS
    batch: list[object] = []
    characters = count = 0
    for worker in connections.busy.values():
        if worker.vhost in wanted and not worker.killed_for:
            claim = _claim(worker, room)
            length = len(json.dumps(claim))
            if characters + length > room:
                tell("claims", claims=batch, **asked)
                batch, characters = [], 0
            batch.append(claim)
            count += 1
            characters += length
    tell("claims", claims=batch, **asked)
    tell("claims_told", count=count, **asked)


def _claim(worker: Worker, most_characters: int) -> list[object]:
    """A connection, its virtual host, and what its client has shown.

    Names may be longer than a message (net.core.wmem_default). Then they are left out, and the
    identity is not complete: nobody is let in on a part of it.
    """
    identity = worker.identity
    claim: list[object] = [worker.connection, worker.vhost, identity and identity.claim()]
    if identity is None or len(json.dumps(claim)) <= most_characters:
        return claim
    nameless = identity.facts._replace(dns=(), uri=(), cn=())
    part = identity._replace(facts=nameless, links=(), complete=False)
    return [worker.connection, worker.vhost, part.claim()]


def cut(connections: Connections, numbers: Collection[int]) -> None:
    """End these connections: the new configuration does not allow them."""
    unwanted = set(numbers)
    for worker in list(connections.busy.values()):
        if worker.connection in unwanted:
            worker.kill("no_longer_allowed")
