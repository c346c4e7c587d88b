"""What the supervisor has a keyd do that it has started: orders in JSON, some with a descriptor.

Run by keyd's threads. The supervisor is trusted: it may read the files of all keys.
"""

import json
import socket
from collections.abc import Callable, Mapping

from keyd.linux.descriptors import receive_if_any
from keyd.powers import Key
from keyd.succession import MAX_ORDER_OCTETS, hand_over

__all__ = ["Orders"]


class Orders:
    """Hands keys to this keyd's successor; ``others`` are called with what comes with them."""

    def __init__(
        self,
        supervisor: socket.socket,
        keys: Mapping[bytes, Key],
        others: Mapping[str, Callable[[list[int]], None]],
    ) -> None:
        self._supervisor = supervisor
        self._keys = keys
        self._others = others

    def hear(self) -> bool:
        """Carry out the next order; returns whether there will be no more."""
        said = receive_if_any(self._supervisor, MAX_ORDER_OCTETS, 1)
        if said is None:
            return False
        octets, descriptors = said
        if not octets:
            # It has ended, and so will this process (PR_SET_PDEATHSIG).
            return True
        order = json.loads(octets)
        if order["do"] in self._others:
            self._others[order["do"]](descriptors)
        else:
            for descriptor in descriptors:
                hand_over(self._keys, order["keys"], descriptor)
        return False
