"""The certificates of a directory, each with its key: which files belong together.

Run by the supervisor and by the commands. It lists names, and opens none of the files.

A pair is a subdirectory with ``fullchain.pem`` and ``privkey.pem``, which is how certbot lays out
/etc/letsencrypt/live, or a file ``NAME.pem`` with both in it. Links are followed. Everything else,
certbot's README for example, and what begins with a dot or has a name that is not UTF-8, is passed
over.
"""

import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

__all__ = ["Pair", "chosen", "pairs"]

_CERTIFICATE, _KEY, _BOTH = "fullchain.pem", "privkey.pem", ".pem"


class Pair(NamedTuple):
    """The files of one certificate and its key: the same file twice if it has both."""

    name: str
    certificate: Path
    key: Path


def pairs(directory: Path) -> list[Pair]:
    """The pairs of a directory, by name; raises OSError.

    A subdirectory with only one of the two files counts: the other one is missing, and reading it
    says so.
    """
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            path = directory / entry.name
            if entry.name.startswith(".") or not _is_utf8(entry.name):
                continue
            if _is_directory(entry):
                certificate, key = path / _CERTIFICATE, path / _KEY
                if os.path.lexists(certificate) or os.path.lexists(key):
                    found.append(Pair(entry.name, certificate, key))
            elif entry.name.endswith(_BOTH):
                found.append(Pair(entry.name.removesuffix(_BOTH), path, path))
    return sorted(found)


def _is_utf8(name: str) -> bool:
    return name.encode(errors="ignore") == os.fsencode(name)


def _is_directory(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link that leads back to itself, for example.
        return False


_Certificate = TypeVar("_Certificate")


def chosen(
    certificates: Iterable[tuple[_Certificate, Iterable[str], datetime]],
) -> dict[str, _Certificate]:
    """Which certificate is shown for which name: the one that is valid for longer.

    Each comes with its names and its end. A renewed certificate is often put beside its
    predecessor (certbot's ``-0001``). Names are in lower case in the result.
    """
    best: dict[str, tuple[datetime, _Certificate]] = {}
    for certificate, names, not_after in certificates:
        for name in names:
            known = best.get(name.lower())
            if known is None or known[0] < not_after:
                best[name.lower()] = not_after, certificate
    return {name: certificate for name, (_, certificate) in best.items()}
