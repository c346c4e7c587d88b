"""Which client certificates a virtual host lets in, by what is in them.

Used by the worker on names that its client chose, after OpenSSL has verified the certificate
(unprivileged); by the supervisor, to end connections that a reload no longer allows; and by the
configuration. Imported only where a virtual host asks for client certificates.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Allow", "Facts", "allows", "dns_matches", "uri_matches"]

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
        or any(name in allow.cn for name in facts.cn)
        or any(dns_matches(pattern, name) for pattern in allow.dns for name in facts.dns)
        or any(uri_matches(pattern, uri) for pattern in allow.uri for uri in facts.uri)
    )


def dns_matches(pattern: str, name: str) -> bool:
    """Whether a DNS name fits a pattern: a name, or ``*.`` and a name (one label for the star)."""
    if not name.isascii():
        return False
    name, pattern = name.lower(), pattern.lower()
    if not _HOST_NAME.fullmatch(name):
        return False
    if pattern.startswith("*."):
        return name.partition(".")[2] == pattern[2:]
    return name == pattern


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
