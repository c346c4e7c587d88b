"""Standard error of a keyd of its own: a thread writes it, and nobody waits for that thread.

Run by ``keyd listen`` and ``keyd control`` once they serve. Whoever reads standard error may be
slow, stopped or gone. What there is no room for is dropped and counted. The count is written once
something can be written again.
"""

import os
import sys
import threading
import time
from queue import SimpleQueue

from keyd.words import Words

__all__ = ["QUEUE_LINES", "StandardError"]

#: All of it is in memory that is locked.
QUEUE_LINES = 500
_STANDARD_ERROR = 2
#: How long ``flush`` waits at most, and how soon to try again where a write would have to wait.
_FLUSH_SECONDS, _PAUSE_SECONDS = 1.0, 0.1


class StandardError(Words):
    """A text file whose lines ``write_all`` writes, in a thread of its own."""

    def __init__(self) -> None:
        super().__init__(self._put)
        # Of lines; and of locks, each of which is released when what was before it is written.
        self._waiting: SimpleQueue[bytes | threading.Lock] = SimpleQueue()
        #: Of ``_lost``. What waits for anything does not hold it. Where the main thread has it, a
        #: signal's handler may say something: it would wait for itself.
        self._counting = threading.RLock()
        self._lost = 0
        self._within_a_line = False

    def take_over(self) -> None:
        """From now on, what Python writes to standard error comes here."""
        sys.stderr.flush()
        sys.stderr = self

    def flush(self) -> None:
        """Wait until all has been written, and not for long. A signal's handler may call this."""
        written = threading.Lock()
        written.acquire()
        self._waiting.put(written)
        written.acquire(timeout=_FLUSH_SECONDS)

    def write_all(self) -> None:
        """Write what comes, for good."""
        while True:
            line = self._waiting.get()
            if not isinstance(line, bytes):
                line.release()
                continue
            with self._counting:
                lost, self._lost = self._lost, 0
            if lost and not self._written(b"keyd: %d lines are lost: no room for them\n" % lost):
                self._lose(lost)
            if not self._written(line):
                self._lose(1)

    def _put(self, line: str) -> None:
        if self._waiting.qsize() >= QUEUE_LINES:
            self._lose(1)
        else:
            self._waiting.put(f"keyd: {line}\n".encode(errors="backslashreplace"))

    def _lose(self, count: int) -> None:
        with self._counting:
            self._lost += count

    def _written(self, line: bytes) -> bool:
        """Write a line, and wait for as long as that takes; returns whether it could be written."""
        # A write has failed within a line, as on a full disk.
        left = b"\n" + line if self._within_a_line else line
        while left:
            try:
                written = os.write(_STANDARD_ERROR, left)
            except BlockingIOError:
                # Another process that has this file made it non-blocking.
                time.sleep(_PAUSE_SECONDS)
                continue
            except OSError:
                # A full disk, a closed pipe.
                return False
            self._within_a_line = not left[:written].endswith(b"\n")
            left = left[written:]
        return True
