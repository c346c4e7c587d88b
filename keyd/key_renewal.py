"""Keys that come and go while a keyd of its own serves: on SIGHUP, it has its files read again.

Run by keyd, the first time before it serves, and then by its threads. What is read comes from a
process of keyd's own (``keyd.key_reader``), from the first time on: so nothing of a key is here but
the key itself, and nothing stays when it is let go of. The key of a file that has become bad stays;
that of a file that has left the directory goes with it.
"""

import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_der_private_key

from keyd.daemon import Keyd
from keyd.key_files import KeySources
from keyd.key_reader import MAX_MESSAGE_OCTETS, ORDER
from keyd.keys import as_bound
from keyd.linux import residue
from keyd.linux.descriptors import if_any, passes
from keyd.loading import load
from keyd.powers import PrivateKey
from keyd.reference import key_id
from keyd.words import say

__all__ = ["Renewal"]

_ENDED = "the process for that has ended"


class _NotRead(Exception):
    """A reading that has ended half-way, and why."""


class Renewal:
    """The keys of files, by their paths. ``take`` and ``drop`` are told of each that comes or goes.

    Only one thread at a time hears the reader. Without a ``reader``, there are no files.
    """

    def __init__(
        self,
        reader: socket.socket | None,
        take: Callable[[PrivateKey], None],
        drop: Callable[[bytes], None],
    ) -> None:
        self._reader = reader
        self._ids: dict[str, bytes] = {}
        self._take, self._drop = take, drop
        self._buffer = bytearray(MAX_MESSAGE_OCTETS)
        #: What this reading has found so far, by path: a key and its id, or why there is none.
        self._found: dict[str, tuple[PrivateKey, bytes] | str] = {}

    def paths(self) -> dict[bytes, str]:
        """The file of each key, by the key's id."""
        return {identity: path for path, identity in self._ids.items()}

    def begin(self, sources: KeySources, needed: bool) -> None:
        """Have the files read for the first time, and wait for that.

        In the directory, a file that holds no key is named, and left out: it does not take the
        others out of service. Raises LookupError for another one, and if there is no key and it is
        ``needed``.
        """
        if self._reader is not None:
            with suppress(OSError):
                # If it has ended, it has said why.
                self._reader.send(ORDER)
            try:
                while not self._read(self._reader):
                    pass
            except (_NotRead, EOFError) as error:
                raise LookupError(f"keys cannot be read: {error}") from None
        found, self._found = self._found, {}
        keys, left_out = [], []
        for path, new in found.items():
            if not isinstance(new, str):
                keys.append(new[0])
                self._ids[path] = new[1]
            elif path in sources.files:
                raise LookupError(new)
            else:
                say(f"left out: {new}")
                left_out.append(new)
        if needed and not keys:
            where = f" in {sources.directory}" if sources.directory else ": set --key"
            why = f": {left_out[0]}" if left_out else ""
            raise LookupError(f"no private key{where}{why}")
        for key in load(keys).values():
            self._take(key)

    def on_hangup(self, keyd: Keyd, renewed: Callable[[], None]) -> None:
        """From now on, have the files read at each SIGHUP, and hear what is in them.

        ``renewed`` is called when keys have come or gone.
        """
        reader = self._reader
        if reader is None:
            return

        def ask(_: int, __: object) -> None:
            try:
                reader.send(ORDER, socket.MSG_DONTWAIT)
            except BlockingIOError:
                # Readings enough are to come.
                pass
            except OSError as error:
                # Said each time: whoever sends this signal expects other keys.
                say(f"keys cannot be read again: {error.strerror if passes(error) else _ENDED}")

        keyd.hear_process(reader, lambda: self._hear(reader, renewed))
        signal.signal(signal.SIGHUP, ask)

    def _hear(self, reader: socket.socket, renewed: Callable[[], None]) -> bool:
        """Take one message of the reader, if there is one; returns whether it has ended."""
        try:
            if self._read(reader, socket.MSG_DONTWAIT) and self._exchange():
                renewed()
        except EOFError as error:
            say(f"keys cannot be read again: {error}")
            return True
        except _NotRead as error:
            # What a part of a reading has found, the next one is to find again.
            self._found = {}
            say(f"keys cannot be read again: {error}: the former ones stay")
        return False

    def _read(self, reader: socket.socket, flags: int = 0) -> bool:
        """Take the next message; returns whether that was all. Raises _NotRead, and EOFError."""
        length = if_any(lambda: reader.recv_into(self._buffer, 0, flags), 0)
        if length is None:
            return False
        if not length:
            raise EOFError(_ENDED)
        message = memoryview(self._buffer)[:length]
        if message[0] == ord("E"):
            return True
        if message[0] == ord("F"):
            raise _NotRead(bytes(message[1:]).decode(errors="replace"))
        start = 3 + int.from_bytes(message[1:3], "big")
        path, content = os.fsdecode(bytes(message[3:start])), message[start:]
        if message[0] == ord("K"):
            self._found[path] = _taken_in(path, content)
        else:
            self._found[path] = bytes(content).decode(errors="backslashreplace")
        # A key's octets are not left behind, but for what the library makes of them.
        message[:] = bytes(length)
        return False

    def _exchange(self) -> bool:
        """Go on with what has been found; returns whether that are other keys."""
        found, self._found = self._found, {}
        before, self._ids = self._ids, {}
        for path, new in found.items():
            if not isinstance(new, str):
                self._ids[path] = new[1]
            elif path in before:
                say(f"{new}: its former key stays")
                self._ids[path] = before[path]
            else:
                say(new)
        there, had = set(self._ids.values()), set(before.values())
        for path, new in found.items():
            if not isinstance(new, str) and new[1] not in had:
                self._take(new[0])
                say(f"{path}: a new key")
        # Several files may have had the same key.
        for identity in had - there:
            self._drop(identity)
        for path, identity in before.items():
            if identity not in there:
                say(f"{path}: its former key is let go of")
        say(f"keys read again: {len(there)}")
        return there != had


def _taken_in(path: str, octets: memoryview) -> tuple[PrivateKey, bytes] | str:
    """The key, and its id, or why it is none."""
    try:
        loaded = load_der_private_key(octets, None, unsafe_skip_rsa_key_validation=True)
        residue.overwrite()
        # What tells that it is bound comes first: no secret is copied.
        key = as_bound(loaded, octets)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        return f"{path}: {error}"
    return key, key_id(key.public_key())
