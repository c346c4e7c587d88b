"""Writes events: one a line to standard error, as text or JSON; or to the journal, as fields.

Run by the supervisor. Fields come from the parent, and some of them from workers, so they are
quoted as data. The reader of the log may be slow, full or gone, so a thread of its own writes.
Nobody waits for that thread: events that find no room are lost and counted. The count is logged
first when the log can be written again.
"""

import json
import os
import queue
import select
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Protocol

from titus_py.supervisor import journal
from titus_py.supervisor.events import is_as_loud

__all__ = ["Log", "as_text"]

_QUEUE_LINES = 20_000
#: Room for so many more alarms, which a flood of other events cannot take.
_QUEUE_ALARMS = 1_000
_STANDARD_ERROR = 2
#: How soon to try again when the journal is too slow, or being restarted.
_PAUSE_SECONDS = 0.1


class _Sink(Protocol):
    def write(self, octets: bytes) -> None:
        """Write a whole line or entry, or raise OSError."""


class Log:
    """The log. ``form`` is "text" or "json"; ``least`` is the quietest level that is recorded.

    Text goes to the journal itself if standard error leads there. ``lost`` is how many events an
    earlier log has lost, and reported as lost.
    """

    def __init__(
        self, form: str, journal_socket: str = journal.SOCKET, least: str = "info", lost: int = 0
    ) -> None:
        self.form = form
        self.least = least
        self._standard_error = _StandardError()
        self._journal: journal.Journal | None = None
        if journal.is_standard_error() and os.path.exists(journal_socket):
            self._journal = journal.Journal(journal_socket)
        self._lines: queue.Queue[tuple[_Sink, bytes] | None] = queue.Queue(
            _QUEUE_LINES + _QUEUE_ALARMS
        )
        # Each of these is changed by one thread only.
        self._not_queued = lost
        self._not_written = 0
        self._reported = lost
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()

    @property
    def lost(self) -> int:
        """How many events were lost."""
        return self._not_queued + self._not_written

    def __call__(self, event: str, level: str = "info", **fields: object) -> None:
        """Record an event, if it is loud enough; never waits."""
        if not is_as_loud(level, self.least):
            return
        try:
            if level != "alarm" and self._lines.qsize() >= _QUEUE_LINES:
                raise queue.Full
            self._lines.put_nowait(self._line(event, level, fields))
        except queue.Full:
            self._not_queued += 1

    def close(self, seconds: float = 2.0) -> None:
        """Let the queue be written for up to ``seconds``. Events that are left then are lost."""
        deadline = time.monotonic() + seconds
        try:
            self._lines.put(None, timeout=seconds)
        except queue.Full:
            pass
        else:
            self._writer.join(max(0.0, deadline - time.monotonic()))
        self._not_queued += self._lines.qsize()

    def _line(self, event: str, level: str, fields: Mapping[str, object]) -> tuple[_Sink, bytes]:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        known = {name: value for name, value in fields.items() if value is not None}
        if self.form == "json":
            return self._standard_error, _octets(_json(now, level, event, known))
        text = as_text(now, level, event, known)
        if self._journal is not None:
            return self._journal, journal.entry(text, level, event, known)
        return self._standard_error, _octets(text)

    # --- the writer's thread ----------------------------------------------------

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            lost = self.lost
            if lost > self._reported:
                count = lost - self._reported
                if self._written(*self._line("log_lines_lost", "error", {"count": count})):
                    self._reported = lost
            if not self._written(*line):
                self._not_written += 1

    def _written(self, sink: _Sink, octets: bytes) -> bool:
        """Write a line or entry; returns whether that succeeded."""
        while True:
            try:
                sink.write(octets)
                return True
            except journal.PASSING:
                # Meanwhile new events wait in the queue, until it is full.
                time.sleep(_PAUSE_SECONDS)
            except OSError:
                # A full disk, a closed pipe: the proxy goes on without its log.
                return False


class _StandardError:
    """Descriptor 2 itself: Python's sys.stderr would keep what it could not write."""

    def __init__(self) -> None:
        self._within_a_line = False

    def write(self, octets: bytes) -> None:
        # The last write failed within a line (the disk was full): begin a new line.
        left = memoryview(b"\n" + octets if self._within_a_line else octets)
        while left:
            try:
                written = os.write(_STANDARD_ERROR, left)
            except BlockingIOError:
                # Another process that shares this file made it non-blocking. This thread may wait.
                poll = select.poll()
                poll.register(_STANDARD_ERROR, select.POLLOUT)
                poll.poll()
                continue
            left = left[written:]
            self._within_a_line = bool(left)


def _octets(line: str) -> bytes:
    return line.encode("utf-8", "backslashreplace") + b"\n"


def _json(now: str, level: str, event: str, fields: dict[str, object]) -> str:
    return _dumped({"time": now, "level": level, "event": event, **fields})


def as_text(now: str, level: str, event: str, fields: Mapping[str, object]) -> str:
    """The line of an event, for people."""
    words = [now, level, event, *(f"{name}={_quoted(value)}" for name, value in fields.items())]
    return " ".join(words)


def _quoted(value: object) -> str:
    text = str(value)
    plain = text and text.isprintable() and not any(character in text for character in ' "=\\')
    return text if plain else _dumped(text)


def _dumped(value: object) -> str:
    """JSON on one line, without characters that break lines or control terminals (U+2028, C1)."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if text.isprintable() else json.dumps(value, default=str)
