"""Limits by address, prefix and rate: clients that are turned away before a worker sees them.

Run by the parent. Of a client, only the address counts.
"""

import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from titus_py.between.event_loop import EventLoop
from titus_py.between.plan import Limits
from titus_py.parent.outbox import Tell
from titus_py.parent.unfinished import Unfinished

__all__ = ["Admission", "LimitsHit", "prefix"]

#: How often a limit that is being hit is logged.
_TELL_SECONDS = 1.0
_BY_ADDRESS = ("connections_per_address", "connections_per_prefix")
_BALANCER = "a load balancer: set accept_proxy_from in [[listen]], which names its clients"
#: A /64 is the least that one site has (RFC 6177). A /24 is what one operator of IPv4 often has.
_IPV6_PREFIX_GROUPS = 4
_IPV4_PREFIX_OCTETS = 3


class Admission:
    """Counts connections by address and prefix, and measures the rate of new ones."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._addresses: Counter[str] = Counter()
        self._prefixes: Counter[str] = Counter()
        self._unfinished = Unfinished(limits.unfinished_per_prefix, limits.unfinished_every, clock)
        #: A token bucket. It is refilled at the configured rate, and holds a second's worth.
        self._tokens = limits.connections_per_second or 0.0
        self._refilled = clock()

    def refuse(self, address: str) -> str | None:
        """Return the limit that this new client would exceed. If none, count it; return None."""
        limit = self._reached(address) or self.refuse_rate()
        if limit is None:
            self._count(address)
        return limit

    def refuse_rate(self) -> str | None:
        """The same for a client whose address is not known yet: only the rate is limited."""
        if self._limits.connections_per_second is not None and not self._take_token():
            return "connections_per_second"
        return None

    def refuse_address(self, address: str) -> str | None:
        """The same for a client that was let in without its address, which is known now."""
        limit = self._reached(address)
        if limit is None:
            self._count(address)
        return limit

    def leave(self, address: str) -> None:
        """Stop counting a client that was let in."""
        for counts, key in ((self._addresses, address), (self._prefixes, prefix(address))):
            counts[key] -= 1
            if not counts[key]:
                del counts[key]

    def unfinished(self, address: str) -> bool:
        """Count a connection that was signed for and never asked for its backend.

        Returns whether it is this address's first one.
        """
        return self._unfinished.count(prefix(address), address)

    def _reached(self, address: str) -> str | None:
        limits = self._limits
        if _reached(self._addresses[address], limits.connections_per_address):
            return "connections_per_address"
        if _reached(self._prefixes[prefix(address)], limits.connections_per_prefix):
            return "connections_per_prefix"
        if self._unfinished.reached(prefix(address)):
            return "unfinished"
        return None

    def _count(self, address: str) -> None:
        self._addresses[address] += 1
        self._prefixes[prefix(address)] += 1

    def _take_token(self) -> bool:
        rate = self._limits.connections_per_second or 0.0
        now = self._clock()
        self._tokens = min(max(rate, 1.0), self._tokens + (now - self._refilled) * rate)
        self._refilled = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


class LimitsHit:
    """Reports that a limit was hit: once a second for each limit, however often it was hit.

    A limit of a known client is one of its own.
    """

    def __init__(self, loop: EventLoop, tell: Tell) -> None:
        self._loop = loop
        self._tell = tell
        #: By limit, and whose it is: how often it was hit within this second, and the last client
        #: that hit it.
        self._hit: dict[tuple[str, str | None], tuple[int, str]] = {}

    def note(self, limit: str, address: str, client_name: str | None = None) -> None:
        key = limit, client_name
        if key not in self._hit:
            self._loop.after(_TELL_SECONDS, lambda: self._say(*key))
        count, _ = self._hit.get(key, (0, ""))
        self._hit[key] = count + 1, address

    def say_last(self) -> None:
        """Report, before the parent ends, what has not been reported yet."""
        for key in list(self._hit):
            self._say(*key)

    def _say(self, limit: str, client_name: str | None) -> None:
        count, address = self._hit.pop((limit, client_name))
        fields = _advice(limit) if client_name is None else {"client_name": client_name}
        self._tell(
            "limited",
            level="warning",
            limit=limit,
            count=count,
            last_client=address,
            **fields,
        )


def _advice(limit: str) -> dict[str, Any]:
    """What to do about a limit that is on unless it is set, and may be too low."""
    if limit == "unfinished":
        advice = "handshakes that clients break off: a certificate that they dislike, a scanner, or"
        return {"advice": f"{advice} an attack; else raise limits.unfinished; {_BALANCER}"}
    if limit == "silent":
        advice = "more clients connect and say nothing than there is room for: raise worker.max, or"
        return {"advice": f"{advice} set limits by address and prefix"}
    if limit not in _BY_ADDRESS:
        return {}
    advice = f"many clients behind one address or network: raise limits.{limit}; {_BALANCER}"
    return {"advice": advice}


def _reached(count: int, limit: int | None) -> bool:
    return limit is not None and count >= limit


@lru_cache(maxsize=1024)
def prefix(address: str) -> str:
    """The /64 of an IPv6 address, or the /24 of an IPv4 one, as a key to count by.

    A user of a unix socket is a network of its own.
    """
    if ":" not in address:
        return ".".join(address.split(".")[:_IPV4_PREFIX_OCTETS])
    if address.startswith("unix:"):
        return address
    head, _, tail = address.partition("%")[0].partition("::")
    groups = head.split(":") if head else []
    if len(groups) < _IPV6_PREFIX_GROUPS:
        rest = tail.split(":") if tail else []
        groups += ["0"] * (8 - len(groups) - len(rest)) + rest
    return ":".join(groups[:_IPV6_PREFIX_GROUPS])
