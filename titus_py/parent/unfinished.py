"""Connections that keyd signed for, and that never asked for their backend: counted by prefix.

Run by the parent. Clients that dislike the certificate are among them; so is a signature that an
attacker has made through a worker that was taken over, unless that worker then asks for its backend
as an honest one does. The limit is a leaky bucket.
"""

import time
from collections.abc import Callable

__all__ = ["Unfinished"]

#: For so many prefixes at most; then the one that was counted first is forgotten.
_MAX_PREFIXES = 10_000


class _Bucket:
    """Of one prefix: how many are in it, as of when, and of which addresses."""

    __slots__ = ("addresses", "at", "level")

    def __init__(self, at: float) -> None:
        self.level = 0.0
        self.at = at
        self.addresses: set[str] = set()


class Unfinished:
    """``per_prefix`` of them at once, and as many again within ``every`` seconds."""

    def __init__(
        self, per_prefix: int, every: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = per_prefix
        self._rate = per_prefix / every
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def count(self, prefix: str, address: str) -> bool:
        """Count a connection; returns whether it is the first one of this address."""
        bucket = self._leaked(prefix)
        if bucket is None:
            if len(self._buckets) >= _MAX_PREFIXES:
                del self._buckets[next(iter(self._buckets))]
            bucket = self._buckets[prefix] = _Bucket(self._clock())
        bucket.level += 1
        # Those who are over the limit come no more, but those who are there already do.
        first = address not in bucket.addresses and len(bucket.addresses) < self._most
        if first:
            bucket.addresses.add(address)
        return first

    def reached(self, prefix: str) -> bool:
        """Whether this prefix has had as many as it may."""
        bucket = self._leaked(prefix)
        return bucket is not None and bucket.level > self._most - 1

    def _leaked(self, prefix: str) -> _Bucket | None:
        """A prefix's bucket, as of now; None, and forgotten, once it is empty."""
        bucket = self._buckets.get(prefix)
        if bucket is None:
            return None
        now = self._clock()
        bucket.level -= (now - bucket.at) * self._rate
        bucket.at = now
        if bucket.level > 0:
            return bucket
        del self._buckets[prefix]
        return None
