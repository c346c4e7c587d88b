"""The keys that keyd begins with: read, used once, and known by their ids.

Run by keyd before it serves; what is used once loads what could not be loaded later.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from keyd.keys import UnusableKey, load_private_key
from keyd.powers import PrivateKey, rehearse
from keyd.reference import key_id
from keyd.words import say

__all__ = ["load", "readable"]


def readable(entries: list[dict[str, Any]]) -> Iterator[PrivateKey]:
    """The keys of these files. Raises UnusableKey, but not for one of a directory of thousands.

    That one was good when it was checked. The supervisor sees that it is missing.
    """
    for entry in entries:
        try:
            yield load_private_key(entry["key"], entry["passphrase_file"])
        except UnusableKey as error:
            if not entry["may_be_missing"]:
                raise
            say(str(error))


def load(keys: Iterable[PrivateKey]) -> dict[bytes, PrivateKey]:
    """Use one of each kind of these keys once; returns all, by their ids."""
    loaded = list(keys)
    # What the library loads late is the same for the others.
    for key in {_kind(key): key for key in loaded}.values():
        rehearse(key)
    return {key_id(key.public_key()): key for key in loaded}


def _kind(key: PrivateKey) -> str:
    return key.curve.name if isinstance(key, ec.EllipticCurvePrivateKey) else type(key).__name__
