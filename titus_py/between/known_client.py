"""Clients that a virtual host knows one by one: what each may reach, and how much of it.

Used by the worker to find which of them its client is, from a certificate that OpenSSL has accepted
(unprivileged); by the parent, which holds the worker's claim against the limits; and by the
supervisor. Imported only where a virtual host has such clients.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from titus_py.between.client_allow import Allow, Facts, allows

__all__ = ["KnownClient", "Rate", "which"]


class Rate(NamedTuple):
    """So many at most, in so many seconds."""

    most: int
    seconds: int


class KnownClient(NamedTuple):
    """One [[vhost.client]]."""

    #: For the log, the counts and the administrator.
    name: str
    allow: Allow
    #: Where its connections go; empty: where the virtual host's do.
    backend: tuple[str, ...]
    #: How many it may have at once; None: any number.
    connections: int | None
    #: How many new ones it may have; None: any number.
    rate: Rate | None

    @classmethod
    def decode(cls, fields: Sequence[Any]) -> "KnownClient":
        """From the lists that JSON makes of it."""
        name, allow, backend, connections, rate = fields
        return cls(name, Allow.decode(allow), tuple(backend), connections, rate and Rate(*rate))


def which(known: Sequence[KnownClient], facts: Facts) -> int | None:
    """The index of the first that a certificate with these facts is of, None if it is nobody's."""
    for index, client in enumerate(known):
        if allows(client.allow, facts):
            return index
    return None
