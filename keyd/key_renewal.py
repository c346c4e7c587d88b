"""Keys that come and go while a keyd of its own serves: on SIGHUP, it has its files read again.

Run by keyd's threads. What is read comes from a process of keyd's own (``keyd.key_reader``). The
key of a file that has become bad stays; that of a file that has left the directory goes with it.
"""

import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_der_private_key

from keyd.daemon import Keyd
from keyd.key_reader import MAX_MESSAGE_OCTETS, ORDER
from keyd.keys import as_bound
from keyd.powers import PrivateKey
from keyd.reference import key_id
from keyd.words import say

__all__ = ["Renewal"]


class Renewal:
    """The keys of files, by their paths. ``take`` and ``drop`` are told of each that comes or goes.

    ``renewed`` is called when some have. Only one thread at a time hears the reader. Without a
    ``reader``, there are no files.
    """

    def __init__(
        self,
        reader: socket.socket | None,
        keys: dict[str, PrivateKey],
        take: Callable[[PrivateKey], None],
        drop: Callable[[bytes], None],
        renewed: Callable[[], None],
    ) -> None:
        self._reader = reader
        self._ids = {path: key_id(key.public_key()) for path, key in keys.items()}
        self._take, self._drop, self._renewed = take, drop, renewed
        self._buffer = bytearray(MAX_MESSAGE_OCTETS)
        #: What this reading has found so far: by path, the new key, its id, or None for a bad file.
        self._found: dict[str, tuple[PrivateKey, bytes] | None] = {}

    def paths(self) -> dict[bytes, str]:
        """The file of each key, by the key's id."""
        return {identity: path for path, identity in self._ids.items()}

    def on_hangup(self, keyd: Keyd) -> None:
        """From now on, have the files read at each SIGHUP, and hear what is in them."""
        reader = self._reader
        if reader is None:
            return

        def ask(_: int, __: object) -> None:
            with suppress(OSError):
                reader.send(ORDER, socket.MSG_DONTWAIT)

        keyd.hear_process(reader, lambda: self._hear(reader))
        signal.signal(signal.SIGHUP, ask)

    def _hear(self, reader: socket.socket) -> bool:
        """Take one message of the reader, if there is one; returns whether it has ended."""
        try:
            length = reader.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            length = 0
        if not length:
            say("keys cannot be read again: the process for that has ended")
            return True
        message = memoryview(self._buffer)[:length]
        if message[0] == ord("E"):
            self._exchange()
            return False
        if message[0] == ord("F"):
            # What a part of a reading has found, the next one is to find again.
            self._found = {}
            why = bytes(message[1:]).decode(errors="replace")
            say(f"keys cannot be read again: {why}: the former ones stay")
            return False
        start = 3 + int.from_bytes(message[1:3], "big")
        path, content = os.fsdecode(bytes(message[3:start])), message[start:]
        if message[0] == ord("K"):
            self._take_in(path, content)
        else:
            self._keep(path, bytes(content).decode(errors="replace"))
        # A key's octets are not left behind, but for what the library makes of them.
        message[:] = bytes(length)
        return False

    def _take_in(self, path: str, octets: memoryview) -> None:
        try:
            loaded = load_der_private_key(octets, None, unsafe_skip_rsa_key_validation=True)
            # What tells that it is bound comes first: no secret is copied.
            key = as_bound(loaded, octets)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            self._keep(path, f"{path}: {error}")
            return
        self._found[path] = key, key_id(key.public_key())

    def _keep(self, path: str, reason: str) -> None:
        kept = ": its former key stays" if path in self._ids else ""
        say(f"{reason}{kept}")
        self._found[path] = None

    def _exchange(self) -> None:
        found, self._found = self._found, {}
        before, self._ids = self._ids, {}
        for path, new in found.items():
            if new is not None:
                self._ids[path] = new[1]
            elif path in before:
                self._ids[path] = before[path]
        there, had = set(self._ids.values()), set(before.values())
        for path, new in found.items():
            if new is not None and new[1] not in had:
                self._take(new[0])
                say(f"{path}: a new key")
        # Several files may have had the same key.
        for identity in had - there:
            self._drop(identity)
        for path, identity in before.items():
            if identity not in there:
                say(f"{path}: its former key is let go of")
        say(f"keys read again: {len(there)}")
        if there != had:
            self._renewed()
