"""Events from the parent to the supervisor. Run by the parent, which waits only when it ends.

The supervisor may be slow. Events that it does not take are queued. If the queue is full, they
are dropped and counted. Part of the queue is for alarms only.
"""

import json
import os
import socket
from collections import deque
from contextlib import suppress
from typing import Protocol

from keyd.linux.descriptors import send_descriptors
from titus_py.between.event_loop import EventLoop

__all__ = ["TEXT_CHARACTERS", "Outbox", "Tell"]

#: A text is cut off after so many: what a worker attempted, or a configuration has, may be long,
#: and the supervisor takes no event that is longer than a message.
TEXT_CHARACTERS = 1000
_EVENTS, _ALARMS = 10_000, 1_000
#: How soon to send again what was not taken.
_PAUSE_SECONDS = 0.01
#: How long to wait for a supervisor that does not take the last events.
_LAST_SECONDS = 5.0


class Tell(Protocol):
    """``Outbox.put``: has the supervisor log an event; takes a report's descriptor over."""

    def __call__(self, event: str, report: int | None = None, **fields: object) -> None: ...


class Outbox:
    """Events for the supervisor, in order."""

    def __init__(self, loop: EventLoop, supervisor: socket.socket) -> None:
        self._loop = loop
        self._supervisor = supervisor
        self._waiting: deque[tuple[bytes, int | None]] = deque()
        self._lost = 0

    def put(self, event: str, report: int | None = None, **fields: object) -> None:
        """Have an event sent; never waits.

        The descriptor of a worker's report is sent along, unread, and closed here.
        """
        room = _EVENTS + (_ALARMS if fields.get("level") == "alarm" else 0)
        if len(self._waiting) >= room:
            self._lost += 1
            if report is not None:
                os.close(report)
            return
        idle = not self._waiting
        if self._lost:
            lost = {"event": "events_lost", "level": "error", "count": self._lost}
            self._lost = 0
            self._waiting.append((json.dumps(lost).encode(), None))
        for name, value in fields.items():
            if isinstance(value, str) and len(value) > TEXT_CHARACTERS:
                fields[name] = value[:TEXT_CHARACTERS]
        self._waiting.append((json.dumps({"event": event, **fields}).encode(), report))
        if idle:
            self._send()

    def send_last(self) -> None:
        """Send the rest before the parent ends. No client is left, so this may wait."""
        self._supervisor.settimeout(_LAST_SECONDS)
        with suppress(OSError):
            while self._waiting:
                self._send_one(0)

    def _send(self) -> None:
        """Send as many as the supervisor takes now, and the others soon."""
        try:
            while self._waiting:
                self._send_one(socket.MSG_DONTWAIT)
        except (BrokenPipeError, ConnectionResetError):
            self._waiting.clear()
        except OSError:
            # The socket's queue is full, or too many descriptors are on their way.
            self._loop.after(_PAUSE_SECONDS, self._send)

    def _send_one(self, flags: int) -> None:
        octets, report = self._waiting[0]
        if report is None:
            self._supervisor.send(octets, flags)
        else:
            send_descriptors(self._supervisor, octets, [report], flags)
            os.close(report)
        self._waiting.popleft()
