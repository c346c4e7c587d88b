"""Starting the process that connects to upstreams, and what keyd then knows of them.

Run by keyd before it reads a key and before it gives anything up (``keyd.helper``).
"""

from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from keyd import helper
from keyd.powers import rehearse
from keyd.upstream.broker import Broker

__all__ = ["start_told"]


def start_told(told: dict[str, Any]) -> Broker:
    """Start what titus-py tells of: ``references`` of the keys, and ``paths`` of the upstreams.

    ``user`` and ``filter`` are the process's. Raises OSError.
    """
    # What judging requests takes is loaded now: in keyd's empty root, there is nothing to load.
    rehearse(ec.derive_private_key(1, ec.SECP256R1()))
    connector = helper.start("connect", told, gives=True)
    return Broker(connector, told["paths"], told["references"])
