"""What keyd tells the supervisor that has started it: events in JSON, without ever waiting.

Run by keyd's threads. A supervisor that does not keep up misses an event, as whoever tells it is
told. News is told as soon as there is room: whoever has it tells it once, and not again before it
changes. Lines that it misses are counted, and it is told how many they are.
"""

import errno
import json
import socket
import threading

from keyd.linux.descriptors import passes

__all__ = ["Teller"]


class Teller:
    def __init__(self, supervisor: socket.socket) -> None:
        self._supervisor = supervisor
        #: By the event's name, the last news that there was no room for; that an event is too
        #: long is news, too.
        self._kept: dict[str, bytes] = {}
        #: Python may have something to say within it (``words``).
        self._lock = threading.RLock()
        self._lost_lines = 0
        #: Events that were too long, which was said.
        self._too_long: set[str] = set()

    def tell(self, event: str, **fields: object) -> bool:
        """Tell it now or never; returns whether there was room for it."""
        return self._send(_encoded(event, fields))

    def say(self, line: str) -> None:
        """A line for the log."""
        if not self._send(_line(line)):
            with self._lock:
                self._lost_lines += 1

    def tell_news(self, event: str, **fields: object) -> None:
        """Tell it now, or with the next ``tell_kept`` unless there is other news by then."""
        message = _encoded(event, fields)
        with self._lock:
            if self._send(message):
                self._kept.pop(event, None)
            else:
                self._kept[event] = message

    def tell_kept(self) -> None:
        """What there was no room for. To be called about once a second."""
        with self._lock:
            for event, message in list(self._kept.items()):
                if self._send(message):
                    del self._kept[event]
            lost = self._lost_lines
            if lost and self._send(_line(f"{lost} lines are lost: no room for them")):
                # One may have been lost within the call (``say``).
                self._lost_lines -= lost

    def _send(self, message: bytes) -> bool:
        """Whether nothing is left to be done: it was sent, or never can be."""
        try:
            self._supervisor.send(message, socket.MSG_DONTWAIT)
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                self._say_too_long(json.loads(message)["event"])
            return not passes(error)
        return True

    def _say_too_long(self, event: str) -> None:
        with self._lock:
            if event in self._too_long:
                return
            self._too_long.add(event)
            said = f"{event}: too long to be told: raise net.core.wmem_default (sysctl)"
            if not self._send(_line(said)):
                # It is said once, and so it must not be lost.
                self._kept[said] = _line(said)


def _encoded(event: str, fields: dict[str, object]) -> bytes:
    return json.dumps({"event": event, **fields}).encode()


def _line(text: str) -> bytes:
    return _encoded("keyd_said", {"text": text})
