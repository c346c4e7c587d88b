"""A connection to one upstream: asks go out, answers come in, neither is waited for.

Run by keyd's threads: it is heard by one of them at a time, and asked by any, with the broker's
lock held. At the other end, beyond what leads there, is a lender on another host. It is trusted
with the keys that it has, and with nothing here: what it says is decoded strictly and bounded.
"""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from keyd.linux.descriptors import if_any, passes
from keyd.protocol import Malformed
from keyd.upstream.messages import (
    BUSY_SECONDS,
    MAX_FROM_LENDER_OCTETS,
    SILENCE_SECONDS,
    Answer,
    Assembler,
    Greeting,
    decode_from_lender,
)
from keyd.words import say

__all__ = ["Connection", "Loop"]

#: How much is heard at once; and how much may wait to be sent: several of the longest asks.
_PIECE_OCTETS, _MOST_UNSENT_OCTETS = 65536, 2 * 1024 * 1024
#: In seconds: how long a lender may take to say who it is, and how long it may say nothing while
#: it has something to answer.
_GREETING_SECONDS, _MUTE_SECONDS = 10.0, 4 * BUSY_SECONDS
#: How many greetings may come between two looks at the clock, about a second.
_MOST_GREETINGS = 16


class Loop(Protocol):
    """Who watches descriptors: keyd."""

    def hear_process(self, process: socket.socket, hear: Callable[[], bool]) -> None: ...

    def await_room(self, connection: socket.socket, go_on: Callable[[], None]) -> None: ...

    def need_no_room(self, connection: socket.socket) -> None: ...


class Connection:
    """``reader`` and ``writer`` are the same socket by two descriptors: each is watched alone.

    ``lock`` is the broker's.
    """

    def __init__(
        self, reader: socket.socket, writer: socket.socket, loop: Loop, lock: threading.Lock
    ) -> None:
        self.reader, self._writer = reader, writer
        self._loop, self._lock = loop, lock
        #: Why it ends, once it does.
        self.ended_for = ""
        self._unsent = bytearray()
        #: Whether a thread sends, or room is waited for.
        self._busy = False
        self._closed = False
        self._assembler = Assembler(MAX_FROM_LENDER_OCTETS)
        self._heard = time.monotonic()
        self._greeted = False
        self._greetings = 0

    def hear(self) -> list[Greeting | Answer]:
        """What has come. Nothing more will once ``ended_for`` says why."""
        piece = if_any(lambda: self.reader.recv(_PIECE_OCTETS, socket.MSG_DONTWAIT), b"")
        if piece is None:
            return []
        if not piece or self.ended_for:
            self.ended_for = self.ended_for or "the connection was closed at its other end"
            return []
        self._heard = time.monotonic()
        self._assembler.add(piece)
        said: list[Greeting | Answer] = []
        try:
            for message in self._assembler.messages():
                one = decode_from_lender(message)
                if isinstance(one, Greeting):
                    self._greeted = True
                    self._greetings += 1
                if self._greetings > _MOST_GREETINGS:
                    # Each takes time, and a piece may have thousands.
                    self.ended_for = "it says too much unasked"
                    break
                said.append(one)
        except Malformed as error:
            self.ended_for = f"it sent {error}"
        return said

    def send(self, octets: bytes) -> bool:
        """Have this sent by ``flush``; returns whether there is room for it. Under the lock."""
        if self.ended_for or len(self._unsent) + len(octets) > _MOST_UNSENT_OCTETS:
            return False
        self._unsent += octets
        return True

    def flush(self) -> None:
        """Send what there is to be sent, unless another thread does. Without the lock.

        What comes meanwhile goes with the next piece: many asks are one call.
        """
        with self._lock:
            if self._busy:
                return
            self._busy = True
        octets, sent = b"", 0
        while True:
            with self._lock:
                del self._unsent[:sent]
                if self._closed:
                    self._writer.close()
                    return
                if sent < len(octets):
                    self._await_room()
                    return
                octets = bytes(self._unsent)
                if not octets:
                    self._busy = False
                    return
            sent = self._send(octets)

    def _await_room(self) -> None:
        """Holds the lock."""
        try:
            self._loop.await_room(self._writer, self._go_on)
        except OSError as error:
            # ENOMEM, ENOSPC: what is half sent cannot go on.
            self._busy = False
            self.end(f"keyd cannot wait to send more: {error.strerror}")
            say(f"a connection to an upstream is ended: {self.ended_for}")

    def _go_on(self) -> None:
        self._loop.need_no_room(self._writer)
        self._busy = False
        self.flush()

    def look_at_clock(self, asked: float | None, awake_since: float) -> None:
        """About once a second: end a connection at whose other end nobody seems to be.

        ``asked`` is since when it has always had something to answer; None: it has nothing.
        ``awake_since`` is when this process last went on after it had been stopped.
        """
        self._greetings = 0
        now = time.monotonic()
        heard = max(self._heard, awake_since)
        silent = now - heard
        if not self._greeted and silent > _GREETING_SECONDS:
            self.end(f"it has not said within {_GREETING_SECONDS:g} s which keys it has")
        elif silent > SILENCE_SECONDS:
            self.end(f"it has said nothing for {SILENCE_SECONDS:g} s")
        elif asked is not None and now - max(asked, heard) > _MUTE_SECONDS:
            self.end(f"it leaves asks unanswered, and has said nothing for {_MUTE_SECONDS:g} s")

    def end(self, why: str) -> None:
        """Have the thread that hears it see its end. Under the lock."""
        if not self.ended_for:
            self.ended_for = why
            self._shut_down()

    def close(self) -> None:
        """Once it is heard no more. Under the lock. The reader is closed by whoever heard it."""
        self._closed = True
        if self._busy:
            # Whoever sends, or waits for room and is woken by this, then closes the writer.
            self._shut_down()
        else:
            self._writer.close()

    def _send(self, octets: bytes) -> int:
        """How many octets were taken. An end is seen by the thread that hears."""
        try:
            return self._writer.send(octets, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            if passes(error):
                # ENOBUFS, ENOMEM. There may be room at once, and no memory for long.
                with self._lock:
                    self.end(f"keyd cannot send more: {error.strerror}")
            return len(octets)

    def _shut_down(self) -> None:
        with suppress(OSError):
            self._writer.shutdown(socket.SHUT_RDWR)
