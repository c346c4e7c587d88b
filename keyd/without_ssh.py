"""What the cryptography library loads for SSH's keys and certificates is not loaded.

Called first of all by programs of ours that start often, or live long: keyd, what checks keys and
handshakes. The library's module for keys in files, which they need, loads all of SSH with it, and
by way of that ``dataclasses``, ``inspect``, ``ast`` and ``dis``: a seventh of what there is to
load, and code that would be in the process with the key for nothing.
"""

import sys
from types import ModuleType

__all__ = ["load_nothing_of_ssh"]

_SSH = "cryptography.hazmat.primitives.serialization.ssh"


class _Nothing(ModuleType):
    """Has every name, for who imports it: whoever then calls for it gets a TypeError."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def load_nothing_of_ssh() -> None:
    """Before anything of cryptography is imported."""
    sys.modules.setdefault(_SSH, _Nothing(_SSH))
