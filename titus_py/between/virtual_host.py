"""Which virtual host a client asked for, and what a client and it may agree on.

In the file's order, the first that matches is taken. Used by the worker on a name that its
client chose (unprivileged, the name not trusted), by the parent on local addresses, and by
the supervisor to find virtual hosts that can never match.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["TlsSettings", "applies_to", "matches", "select"]


class TlsSettings(NamedTuple):
    """What a virtual host's clients may negotiate; None is the default."""

    min_version: str
    max_version: str
    ciphers: str | None
    ciphersuites: str | None
    groups: tuple[str, ...] | None
    rsa_key_exchange: bool
    #: Application protocols, best first; None: none is negotiated.
    alpn: tuple[str, ...] | None = None
    #: Whether a client has to negotiate one.
    alpn_required: bool = False

    @classmethod
    def decode(cls, fields: list[Any]) -> "TlsSettings":
        """From the list that JSON makes of it."""
        return cls._make(tuple(one) if isinstance(one, list) else one for one in fields)


def matches(pattern: str, server_name: str | None) -> bool:
    """Whether a server name (RFC 6066 §3), or None where none was sent, fits a pattern.

    A pattern is a name, ``*.`` and a name (exactly one label in the star's place), or
    ``""``: no name sent. Case and a trailing dot in the server name do not matter.
    """
    if server_name is None:
        return pattern == ""
    # str.lower() turns some non-ASCII letters into ASCII ones. A name with such letters matches
    # no pattern.
    if not server_name.isascii():
        return False
    name = server_name.removesuffix(".").lower()
    if not name:
        return False
    if pattern.startswith("*."):
        label, _, parent = name.partition(".")
        return bool(label) and parent == pattern[2:].lower()
    return name == pattern.lower()


def select(patterns: Sequence[tuple[str, ...] | None], server_name: str | None) -> int | None:
    """The index of the first virtual host that matches, None if none does.

    ``patterns`` has one entry for each virtual host: its patterns, or None if it takes any name,
    and clients that send no name.
    """
    for index, names in enumerate(patterns):
        if names is None or any(matches(name, server_name) for name in names):
            return index
    return None


def applies_to(local_address: str | None, local_port: int | None, address: str, port: int) -> bool:
    """Whether a virtual host with these settings serves what came to address and port.

    Addresses are numeric, in the canonical form of RFC 5952.
    """
    return local_address in (None, address) and local_port in (None, port)
