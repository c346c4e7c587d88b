"""Writes events: one a line to standard error, as text or JSON; or to the journal, as fields.

Run by the supervisor. Fields come from the parent, and some of them from workers, so they are
quoted as data. The reader of the log may be slow, full or gone, so a thread of its own writes.
Nobody waits for that thread: events that find no room are lost and counted. The count is logged
first when the log can be written again.

Waking the thread for each of many events would cost more than all else that is done for them. So
it rests for a moment when it has written, and then writes several at a time. Events that are not
ordinary do not let it rest.
"""

import json
import os
import re
import select
import threading
import time
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime

from titus_py.supervisor import journal
from titus_py.supervisor.events import is_as_loud

__all__ = ["Log", "as_text"]

#: So many lines wait at most, and so many octets. A line may have a hundred times as many as most
#: have, where whoever is heard wants that.
_QUEUE_LINES, _QUEUE_OCTETS = 20_000, 32 * 1024 * 1024
#: Room for so many more alarms, which a flood of other events cannot take.
_QUEUE_ALARMS, _ALARMS_OCTETS = 1_000, 4 * 1024 * 1024
_STANDARD_ERROR = 2
#: How soon to try again when the journal is too slow, or being restarted.
_PAUSE_SECONDS = 0.1
#: How long the thread rests when it has written all that there was.
_REST_SECONDS = 0.02
#: What it lets wait meanwhile, at the level of information.
_ORDINARY = frozenset({"connection_begun", "connection_ended", "handshake_failed"})
#: Lines that are written at once: what others write to the same pipe does not come between
#: (pipe(7), PIPE_BUF).
_AT_ONCE_OCTETS = select.PIPE_BUF
_NOT_PLAIN = re.compile(r'[ "=\\]')

_encode = json.JSONEncoder(ensure_ascii=False, default=str).encode


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
        #: Lines, and whether each is an entry for the journal. The thread takes off what it has
        #: written; only the others put on.
        self._lines: deque[tuple[bool, bytes]] = deque()
        self._awake = threading.Event()
        self._no_rest = threading.Event()
        self._closed = False
        # Each of these is changed by one thread only.
        self._octets_queued = self._octets_taken = 0
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
        is_alarm = level == "alarm"
        octets = self._octets_queued - self._octets_taken
        if len(self._lines) >= _QUEUE_LINES + is_alarm * _QUEUE_ALARMS or (
            octets >= _QUEUE_OCTETS + is_alarm * _ALARMS_OCTETS
        ):
            self._not_queued += 1
            return
        line = self._line(event, level, fields)
        self._octets_queued += len(line[1])
        self._lines.append(line)
        if event not in _ORDINARY or level != "info":
            self._no_rest.set()
        if not self._awake.is_set():
            self._awake.set()

    def close(self, seconds: float = 2.0) -> None:
        """Let the queue be written for up to ``seconds``. Events that are left then are lost."""
        self._closed = True
        self._no_rest.set()
        self._awake.set()
        self._writer.join(seconds)
        self._not_queued += len(self._lines)

    def _line(self, event: str, level: str, fields: Mapping[str, object]) -> tuple[bool, bytes]:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        known = {name: value for name, value in fields.items() if value is not None}
        if self.form == "json":
            return False, _octets(_json(now, level, event, known))
        text = as_text(now, level, event, known)
        if self._journal is not None:
            return True, journal.entry(text, level, event, known)
        return False, _octets(text)

    # --- the writer's thread ----------------------------------------------------

    def _write(self) -> None:
        while True:
            self._awake.wait()
            # Before looking: whoever puts a line on now wakes this thread again.
            self._awake.clear()
            self._no_rest.clear()
            while self._lines:
                self._write_some()
            if self._closed and not self._lines:
                return
            self._no_rest.wait(_REST_SECONDS)

    def _write_some(self) -> None:
        """Write the next entry for the journal, or the next lines; first, how many were lost."""
        lost = self.lost
        if lost > self._reported:
            count = lost - self._reported
            if not self._unwritten(*self._line("log_lines_lost", "error", {"count": count})):
                self._reported = lost
        for_journal, octets = self._lines[0]
        count = 1
        while not for_journal and count < len(self._lines):
            next_for_journal, line = self._lines[count]
            if next_for_journal or len(octets) + len(line) > _AT_ONCE_OCTETS:
                break
            octets += line
            count += 1
        self._not_written += self._unwritten(for_journal, octets)
        for _ in range(count):
            self._octets_taken += len(self._lines.popleft()[1])

    def _unwritten(self, for_journal: bool, octets: bytes) -> int:
        """Write an entry or lines; returns how many of them could not be written."""
        if not for_journal or self._journal is None:
            return self._standard_error.write(octets)
        while True:
            try:
                self._journal.write(octets)
                return 0
            except journal.PASSING:
                # Meanwhile new events wait in the queue, until it is full.
                time.sleep(_PAUSE_SECONDS)
            except OSError:
                return 1


class _StandardError:
    """Descriptor 2 itself: Python's sys.stderr would keep what it could not write."""

    def __init__(self) -> None:
        self._within_a_line = False

    def write(self, lines: bytes) -> int:
        """Write whole lines; returns how many could not be written, or not to their end."""
        # The last write failed within a line (the disk was full): begin a new line.
        left = b"\n" + lines if self._within_a_line else lines
        while left:
            try:
                written = os.write(_STANDARD_ERROR, left)
            except BlockingIOError:
                # Another process that shares this file made it non-blocking. This thread may wait.
                poll = select.poll()
                poll.register(_STANDARD_ERROR, select.POLLOUT)
                poll.poll()
                continue
            except OSError:
                # A full disk, a closed pipe: the proxy goes on without its log.
                return min(left.count(b"\n"), lines.count(b"\n"))
            self._within_a_line = not left[:written].endswith(b"\n")
            left = left[written:]
        return 0


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
    plain = text and text.isprintable() and _NOT_PLAIN.search(text) is None
    return text if plain else _dumped(text)


def _dumped(value: object) -> str:
    """JSON on one line, without characters that break lines or control terminals (U+2028, C1)."""
    text = _encode(value)
    return text if text.isprintable() else json.dumps(value, default=str)
