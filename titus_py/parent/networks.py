"""Whether an address is in one of a few networks: load balancers, by where they are.

Or on a unix socket: who may connect to that, its file's mode says.

Imported by the parent where a listener takes connections from load balancers alone.
"""

import socket
from collections.abc import Collection, Iterable

from titus_py.between.plan import Listener

__all__ = ["Networks", "balancers"]

_UNIX = "unix"


class Networks:
    """Made of networks as ``ipaddress`` writes them: ``10.0.0.0/8``, ``2001:db8::/32``.

    ``unix`` is all clients of a unix socket.
    """

    def __init__(self, networks: Collection[str]) -> None:
        self._has_unix = _UNIX in networks
        #: The octets of an address, how many bits to leave out, and the bits that are left.
        self._prefixes: list[tuple[int, int, int]] = []
        for network in networks:
            if network == _UNIX:
                continue
            address, _, length = network.partition("/")
            octets = _packed(address)
            dropped = 8 * len(octets) - int(length)
            self._prefixes.append((len(octets), dropped, int.from_bytes(octets, "big") >> dropped))

    def __contains__(self, address: str) -> bool:
        """Whether a numeric address, perhaps with an interface, is in one of them.

        A client of a unix socket is named as ``unix_clients`` does.
        """
        if address.startswith("unix:"):
            return self._has_unix
        octets = _packed(address.partition("%")[0])
        number = int.from_bytes(octets, "big")
        return any(
            length == len(octets) and number >> dropped == prefix
            for length, dropped, prefix in self._prefixes
        )


def balancers(listeners: Iterable[Listener]) -> dict[int, tuple[Networks, int]]:
    """Of the listeners that take only load balancers, by descriptor: which, and their timeout.

    The timeout is in milliseconds, and at least 1.
    """
    return {
        listener.descriptor: (
            Networks(listener.accept_proxy_from),
            max(1, int(listener.proxy_timeout * 1000)),
        )
        for listener in listeners
        if listener.accept_proxy_from
    }


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
