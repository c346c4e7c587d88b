"""The certificates of a throwaway authority, as files."""

from pathlib import Path
from typing import NamedTuple

from titus_py.audit.throwaway_authority import ThrowawayAuthority


class Certificate(NamedTuple):
    """A certificate's files; ``authority`` is what a client trusts to trust it."""

    certificate: Path
    key: Path
    authority: Path


class Authority:
    """Issues certificates below one directory: one of each kind and name, once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._authority = ThrowawayAuthority()
        self._issued: dict[tuple[str, tuple[str, ...]], Certificate] = {}
        self._file = directory / "authority.crt"
        self._file.write_bytes(self._authority.certificate)

    def issue(self, kind: str = "P-256", *names: str) -> Certificate:
        """A certificate for these names, or for ``localhost``, with a key of this kind."""
        names = names or ("localhost",)
        if (kind, names) not in self._issued:
            self._issued[kind, names] = self._issue(kind, names)
        return self._issued[kind, names]

    def _issue(self, kind: str, names: tuple[str, ...]) -> Certificate:
        issued = self._authority.issue(kind, names)
        stem = f"{len(self._issued)}-{kind}"
        files = Certificate(
            self._directory / f"{stem}.crt", self._directory / f"{stem}.key", self._file
        )
        files.certificate.write_bytes(issued.certificate)
        files.key.touch(mode=0o600)
        files.key.write_bytes(issued.key)
        return files
