"""Events from the parent to the supervisor. Run by the parent, which waits only when it ends.

The supervisor may be slow. Events that it does not take are queued. If the queue is full, they
are dropped and counted. Part of the queue is for alarms only.

Waking the supervisor costs more than an event does. So what is ordinary waits a moment for others
where there were others just before, and they go in one message. That a connection has begun always
waits: else the supervisor would want the processor while the client's handshake does.
"""

import json
import os
import select
import socket
import time
from collections import deque
from typing import Protocol

from keyd.linux.descriptors import send_descriptors
from titus_py.between.event_loop import EventLoop, Timer

__all__ = ["MAX_EVENTS", "MAX_REPORTS", "MESSAGE_OCTETS", "TEXT_CHARACTERS", "Outbox", "Tell"]

#: What the supervisor receives at once. It would see the beginning of a longer message, and end
#: this process.
MESSAGE_OCTETS = 64 * 1024
#: A text is cut off after so many: what a worker attempted, or a configuration has, may be long.
TEXT_CHARACTERS = 1000
#: The same of an event for which there is no room otherwise: a character is up to 12 octets.
_FEWER_CHARACTERS = 100, 30
#: How many events one message has at most, and how many of them have a report.
MAX_EVENTS, MAX_REPORTS = 100, 50
#: How long a message of several events is at most.
_SEVERAL_OCTETS = 32 * 1024
#: How much less than a socket's buffer a message is at most (unix_dgram_sendmsg in net/unix).
_BESIDE_A_MESSAGE = 32
_EVENTS, _ALARMS = 10_000, 1_000
#: This one is said once, and the supervisor ends this process if it is not: it always has room.
_RETIRED = "retired"
#: How soon to send again what was not taken.
_PAUSE_SECONDS = 0.01
#: What is ordinary comes at most so often, unless there is more of it than a message has room for.
_GATHER_SECONDS = 0.02
#: These are ordinary, at the level of information.
_BEGUN = "connection_begun"
_ORDINARY = frozenset({_BEGUN, "connection_over"})
#: How long to wait for a supervisor that does not take the last events.
_LAST_SECONDS = 5.0

_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


class Tell(Protocol):
    """``Outbox.put``: has the supervisor log an event; takes a report's descriptor over."""

    def __call__(self, event: str, report: int | None = None, **fields: object) -> None: ...


class Outbox:
    """Events for the supervisor, in order."""

    def __init__(self, loop: EventLoop, supervisor: socket.socket) -> None:
        self._loop = loop
        self._supervisor = supervisor
        # net.core.wmem_default may be less than usual.
        room = supervisor.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - _BESIDE_A_MESSAGE
        #: How long a message is at most, and one of several events.
        self.room = min(MESSAGE_OCTETS, room)
        self._several = min(_SEVERAL_OCTETS, room)
        self._waiting: deque[tuple[bytes, int | None]] = deque()
        self._lost = 0
        #: When to send, where that is not now; and whether the supervisor took no more.
        self._timer: Timer | None = None
        self._refused = False
        self._sent = -_GATHER_SECONDS

    def put(self, event: str, report: int | None = None, **fields: object) -> None:
        """Have an event sent; never waits.

        The descriptor of a worker's report is sent along, unread, and closed here.
        """
        octets = _encoded(event, fields, TEXT_CHARACTERS)
        for fewer in _FEWER_CHARACTERS:
            if len(octets) > self.room:
                octets = _encoded(event, fields, fewer)
        most = _EVENTS + (_ALARMS if fields.get("level") == "alarm" else 0)
        is_full = len(self._waiting) >= most and event != _RETIRED
        if is_full or len(octets) > self.room:
            self._lost += 1
            if report is not None:
                os.close(report)
            return
        self._tell_lost()
        self._waiting.append((octets, report))
        if self._refused:
            return
        early = _GATHER_SECONDS
        if event != _BEGUN:
            early += self._sent - time.monotonic()
        ordinary = event in _ORDINARY and fields.get("level", "info") == "info"
        if early <= 0 or not ordinary or len(self._waiting) >= MAX_EVENTS:
            self._send()
        elif self._timer is None:
            self._timer = self._loop.after(early, self._send)

    def send_last(self) -> None:
        """Send the rest before the parent ends. No client is left, so this may wait."""
        self._tell_lost()
        self._supervisor.settimeout(_LAST_SECONDS)
        tries = int(_LAST_SECONDS / _PAUSE_SECONDS)
        while self._waiting and tries:
            try:
                self._send_some(0)
            except (BrokenPipeError, ConnectionResetError, TimeoutError):
                return
            except OSError:
                # Too many descriptors are on their way. A pause that the filter allows.
                select.poll().poll(_PAUSE_SECONDS * 1000)
                tries -= 1

    def _tell_lost(self) -> None:
        """Have it told, after all that waits, how many events were lost."""
        if self._lost:
            lost = {"level": "error", "count": self._lost}
            self._lost = 0
            self._waiting.append((_encoded("events_lost", lost, TEXT_CHARACTERS), None))

    def _send(self) -> None:
        """Send as many as the supervisor takes now, and the others soon."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._refused = False
        self._sent = time.monotonic()
        try:
            while self._waiting:
                self._send_some(socket.MSG_DONTWAIT)
        except (BrokenPipeError, ConnectionResetError):
            self._waiting.clear()
        except OSError:
            # The socket's queue is full, or too many descriptors are on their way.
            self._refused = True
            self._timer = self._loop.after(_PAUSE_SECONDS, self._send)

    def _send_some(self, flags: int) -> None:
        """Send the next event, and in the same message those after it for which there is room."""
        octets, report = self._waiting[0]
        reports = [] if report is None else [report]
        count = 1
        while count < min(len(self._waiting), MAX_EVENTS) and len(reports) < MAX_REPORTS:
            more, report = self._waiting[count]
            if len(octets) + len(more) + len(b"[,]") > self._several:
                break
            octets += b"," + more
            if report is not None:
                reports.append(report)
            count += 1
        if count > 1:
            octets = b"[" + octets + b"]"
        send_descriptors(self._supervisor, octets, reports, flags)
        for _ in range(count):
            self._waiting.popleft()
        for report in reports:
            os.close(report)


def _encoded(event: str, fields: dict[str, object], characters: int) -> bytes:
    """An event as the supervisor takes it, its texts cut off after so many characters."""
    for name, value in fields.items():
        if isinstance(value, str) and len(value) > characters:
            fields[name] = value[:characters]
    return _encode({"event": event, **fields}).encode()
