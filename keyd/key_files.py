"""The files of the keys that a keyd of its own serves: which there are, and what is in each.

Used by the process that reads them for a keyd of its own (``keyd.key_reader``).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from keyd.keys import UnusableKey, load_private_key, read
from keyd.powers import PrivateKey

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

    def _in_directory(self) -> list[str]:
        if not self.directory:
            return []
        found = sorted(map(str, Path(self.directory).iterdir()))
        return [path for path in found if path not in {self.passphrase_file, *self.no_keys}]
