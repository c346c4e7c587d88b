"""Events, one a line, on standard error: as text or as JSON.

Run by the supervisor. Fields come from the parent, and some of them from workers:
they are data, quoted. Whoever reads standard error may be slow or gone, so that a
thread of its own writes; what it cannot keep up with is counted, not waited for.
"""

import json
import queue
import sys
import threading
from datetime import UTC, datetime

__all__ = ["Log"]

_QUEUE_LINES = 20_000


class Log:
    """Where events go; ``form`` is "text" or "json"."""

    def __init__(self, form: str) -> None:
        self.form = form
        self._lines: queue.Queue[str | None] = queue.Queue(_QUEUE_LINES)
        self._lost = 0
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()

    def __call__(self, event: str, level: str = "info", **fields: object) -> None:
        """Record an event; never waits."""
        if self._lost and not self._lines.full():
            lost, self._lost = self._lost, 0
            self("log_lines_lost", level="error", count=lost)
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        known = {name: value for name, value in fields.items() if value is not None}
        line = (
            _json(now, level, event, known)
            if self.form == "json"
            else _text(now, level, event, known)
        )
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost += 1

    def close(self, seconds: float = 2.0) -> None:
        """Give what is queued so much time to be written."""
        try:
            self._lines.put(None, timeout=seconds)
        except queue.Full:
            return
        self._writer.join(seconds)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                sys.stderr.write(line + "\n")
                sys.stderr.flush()
            except OSError:
                # A full disk, a closed pipe: the proxy goes on without its log.
                self._lost += 1


def _json(now: str, level: str, event: str, fields: dict[str, object]) -> str:
    return json.dumps({"time": now, "level": level, "event": event, **fields}, ensure_ascii=False)


def _text(now: str, level: str, event: str, fields: dict[str, object]) -> str:
    words = [now, level, event, *(f"{name}={_quoted(value)}" for name, value in fields.items())]
    return " ".join(words)


def _quoted(value: object) -> str:
    text = str(value)
    plain = text and text.isprintable() and not any(character in text for character in ' "=\\')
    return text if plain else json.dumps(text, ensure_ascii=False)
