"""The files of the keys that a keyd of its own serves: which there are, and what is in each.

Run by ``keyd listen`` and ``keyd control`` at their start, and by the process that reads the files
again (``keyd.key_reader``).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from keyd.keys import UnusableKey, load_private_key, read
from keyd.powers import PrivateKey
from keyd.words import say

__all__ = ["KeySources"]


class KeySources(NamedTuple):
    """What the command line says: files, and a directory whose files are keys."""

    files: tuple[str, ...]
    directory: str | None
    #: Only keys that are encrypted get it.
    passphrase_file: str | None
    #: What else may be in the directory: the PINs of tokens.
    no_keys: frozenset[str] = frozenset()

    @property
    def any(self) -> bool:
        return bool(self.files or self.directory)

    def load(self) -> Iterator[tuple[str, PrivateKey | UnusableKey]]:
        """Each file, and the key in it or why there is none. Raises OSError for a directory."""
        for path in (*self.files, *self._in_directory()):
            try:
                encrypted = b"ENCRYPTED" in read(path, "key")
                yield path, load_private_key(path, self.passphrase_file if encrypted else None)
            except UnusableKey as error:
                yield path, error

    def load_all(self, needed: bool) -> dict[str, PrivateKey]:
        """The keys of all files, by their paths.

        In the directory, a file that holds no key is named, and left out: it does not take the
        others out of service. Raises UnusableKey, and LookupError if there is no key and it is
        ``needed``.
        """
        keys: dict[str, PrivateKey] = {}
        for path, found in self.load():
            if not isinstance(found, UnusableKey):
                keys[path] = found
            elif path in self.files:
                raise found
            else:
                say(f"left out: {found}")
        if needed and not keys:
            where = f" in {self.directory}" if self.directory else ": set --key"
            raise LookupError(f"no private key{where}")
        return keys

    def _in_directory(self) -> list[str]:
        if not self.directory:
            return []
        found = sorted(map(str, Path(self.directory).iterdir()))
        return [path for path in found if path not in {self.passphrase_file, *self.no_keys}]
