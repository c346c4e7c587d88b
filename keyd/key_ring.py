"""The keys that a keyd of its own has, as they come and go.

Changed by keyd's threads: by the one that hears what is in the files now, and by those that hear
tokens. A key may be in a file and in a token as well. That of the file is used while there is one,
since it cannot be down.
"""

import threading
from collections.abc import Callable

from keyd.powers import Key, KeyElsewhere
from keyd.protocol import Power
from keyd.reference import key_id

__all__ = ["KeyRing"]


class KeyRing:
    """Keys, and what each may be used for, by the keys' ids.

    ``changed`` is called whenever a key has come or gone.
    """

    def __init__(self, granted: frozenset[Power], changed: Callable[[], None]) -> None:
        self.keys: dict[bytes, Key] = {}
        self.grants: dict[bytes, frozenset[Power]] = {}
        self._granted = granted
        self._changed = changed
        self._elsewhere: dict[bytes, KeyElsewhere] = {}
        self._lock = threading.Lock()

    def take(self, key: Key) -> None:
        """A key that can be used from now on."""
        identity = key_id(key.public_key())
        with self._lock:
            if isinstance(key, KeyElsewhere):
                self._elsewhere[identity] = key
                key = self._own(identity) or key
            self.keys[identity], self.grants[identity] = key, self._granted
        self._changed()

    def drop(self, identity: bytes) -> None:
        """The key of a file that is there no more."""
        with self._lock:
            if identity in self._elsewhere:
                self.keys[identity] = self._elsewhere[identity]
            else:
                del self.keys[identity], self.grants[identity]
        self._changed()

    def _own(self, identity: bytes) -> Key | None:
        key = self.keys.get(identity)
        return None if isinstance(key, KeyElsewhere) else key
