"""What a tunnel is to do, for the parent and its fork server: a part of the plan.

Imported only where the configuration has a tunnel, and in the supervisor.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from titus_py.between.plan import Certificate

__all__ = ["TunnelTerms"]


class TunnelTerms(NamedTuple):
    """One [[tunnel]]. Times are in seconds."""

    #: Where connections go, and in which order the places are tried (``VirtualHost.balance``).
    connect: tuple[str, ...]
    balance: str
    connect_timeout: float
    #: The server's name, or numeric address: sent to it, and held against its certificate.
    server_name: str | None
    #: Certificates that are trusted, PEM; empty: the keys in ``pins`` are all that counts.
    authorities: str
    #: SHA-256 of each SubjectPublicKeyInfo that is accepted, in hexadecimal; empty: any.
    pins: tuple[str, ...]
    min_version: str
    #: Application protocols that are offered, best first.
    alpn: tuple[str, ...] | None
    #: Which PROXY header the server gets, before TLS: "v1", "v2", or None.
    send_proxy: str | None
    #: How long connections may go on once nobody is accepted any more; None: until they end.
    drain: float | None
    #: What a server is shown that asks for it; None: nothing.
    certificate: Certificate | None = None
    #: Whether the server is first asked for TLS, as PostgreSQL's is.
    starttls: bool = False
    #: Whether its client is this instance's own keyd, which asks other hosts through it.
    for_keyd: bool = False

    def with_texts(self, change: Callable[[Any], Any]) -> "TunnelTerms":
        """The same with the text that may be long changed: to its number, and back."""
        return self._replace(authorities=change(self.authorities))

    @classmethod
    def decode(cls, fields: list[Any]) -> "TunnelTerms":
        """From the list that JSON makes of it."""
        terms = cls._make(tuple(one) if isinstance(one, list) else one for one in fields)
        certificate = terms.certificate
        return terms._replace(certificate=certificate and Certificate(*certificate))
