"""Which client certificates a virtual host lets in, by what is in them.

Used by the worker on names that its client chose, after OpenSSL has verified the certificate
(unprivileged); by the supervisor, to end connections that a reload no longer allows; and by the
configuration. Imported only where a virtual host asks for client certificates.

A worker that was taken over claims thousands of names, and there may be thousands of patterns. So
no name is held against each of them.
"""

import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

__all__ = ["Allow", "Facts", "allows", "uri_matches"]

#: A host name as certificates have it. A name with a star in it stands for no client.
_HOST_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
#: Segments that stand for other ones (RFC 3986 §5.2.4), or for none.
_NO_SEGMENT = frozenset({"", ".", ".."})


class Allow(NamedTuple):
    """Who is let in: one match suffices. Patterns, but for ``cn``; ``spki`` is in hexadecimal."""

    dns: tuple[str, ...] = ()
    uri: tuple[str, ...] = ()
    cn: tuple[str, ...] = ()
    #: SHA-256 of the SubjectPublicKeyInfo.
    spki: tuple[str, ...] = ()

    @classmethod
    def decode(cls, fields: Sequence[Sequence[str]]) -> "Allow":
        """From the lists that JSON makes of it."""
        return cls(*map(tuple, fields))


class Facts(NamedTuple):
    """What a certificate says of its owner: subjectAltName, common names, public key."""

    dns: tuple[str, ...]
    uri: tuple[str, ...]
    cn: tuple[str, ...]
    spki: str


def allows(allow: Allow | None, facts: Facts) -> bool:
    """Whether a verified certificate with these facts is let in; ``allow`` is None for all."""
    if allow is None:
        return True
    return (
        facts.spki in allow.spki
        or not frozenset(facts.cn).isdisjoint(allow.cn)
        or not _fitting(facts.dns).isdisjoint(map(str.lower, allow.dns))
        or any(_fits_one(pattern, facts.uri) for pattern in allow.uri)
    )


# Of several clients, each is asked about the same names in turn (``known_client.which``).
@lru_cache(maxsize=1)
def _fitting(names: tuple[str, ...]) -> frozenset[str]:
    """The patterns that one of these DNS names fits, in lower case.

    Each is a name, or ``*.`` and a name: one label for the star.
    """
    ascii_names = [name.lower() for name in names if name.isascii()]
    hosts = [name for name in ascii_names if _HOST_NAME.fullmatch(name)]
    return frozenset(hosts).union(f"*.{name.partition('.')[2]}" for name in hosts)


def _fits_one(pattern: str, uris: Collection[str]) -> bool:
    """Whether one of these fits a pattern (``uri_matches``)."""
    head, star, _ = pattern.partition("*")
    if not star:
        return pattern in uris
    return any(uri_matches(pattern, uri) for uri in uris if uri.startswith(head))


def uri_matches(pattern: str, uri: str) -> bool:
    """Whether a URI fits a pattern, which is compared with it segment by segment, as it is.

    ``*`` stands for one segment of the path, ``**`` at the end for one or more. A segment that a
    star stands for is neither empty nor ``.`` nor ``..``.
    """
    wanted, found = pattern.split("/"), uri.split("/")
    if wanted[-1] == "**":
        wanted = wanted[:-1] + ["*"] * (len(found) - len(wanted) + 1)
        if len(wanted) < len(pattern.split("/")):
            return False
    return len(wanted) == len(found) and all(
        segment not in _NO_SEGMENT if star == "*" else segment == star
        for star, segment in zip(wanted, found, strict=True)
    )
