"""What systemd and a service say to each other (sd_notify(3), sd_listen_fds(3)).

Run by the supervisor, and by a keyd on its own. Without systemd, nothing happens.
"""

import os
import socket
import threading
import time
from collections import deque
from contextlib import suppress

__all__ = ["Notifier", "close_inherited", "passed_sockets"]

_FIRST_DESCRIPTOR = 3
_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")
#: What is said once. All else is said again and again.
_STATES = {"ready", "reloading", "stopping"}
#: So many of these are kept for a manager that does not listen: the last ones count.
_MOST_KEPT = 8


class Notifier:
    """A socket to the service manager, where there is one. Never blocks; for any thread.

    It is connected at once: from an empty root, the manager's socket could not be found.
    """

    def __init__(self) -> None:
        #: The variables that this was made from, for a program that is executed in our place.
        self.environment = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            with suppress(OSError):
                self._socket.connect("\0" + address[1:] if address[0] == "@" else address)
        #: Held while anything is sent: nothing in that waits.
        self._lock = threading.Lock()
        #: What there was no room for, in order.
        self._kept: deque[str] = deque(maxlen=_MOST_KEPT)
        self._last_word_said = False
        #: How often to notify the watchdog, in seconds; None if there is no watchdog.
        self.watchdog: float | None = None
        watched_pid = os.environ.pop("WATCHDOG_PID", str(os.getpid()))
        microseconds = os.environ.pop("WATCHDOG_USEC", "")
        if microseconds.isdecimal() and watched_pid == str(os.getpid()):
            # Half of the watchdog's time, as sd_watchdog_enabled(3) advises.
            self.watchdog = int(microseconds) / 2_000_000

    def __call__(self, **fields: object) -> None:
        """Send variables such as READY=1; their names are given in lower case.

        A manager that is busy has a full queue, and must not hold us up. What it has to know is
        sent with the next call.
        """
        text = "\n".join(f"{name.upper()}={value}" for name, value in fields.items())
        with self._lock:
            sent = self._send_kept() and self._send(text)
            if not sent and fields.keys() & _STATES:
                self._kept.append(text)

    def _send_kept(self) -> bool:
        """Whether nothing is kept any more. Holds the lock."""
        while self._kept:
            if not self._send(self._kept[0]):
                return False
            self._kept.popleft()
        if self._last_word_said:
            self._close()
        return True

    def _send(self, text: str) -> bool:
        """Whether there was room for it, or nobody to send it to."""
        manager = self._socket
        if manager is not None:
            try:
                manager.send(text.encode())
            except BlockingIOError:
                return False
            except OSError:
                return True
        return True

    def ready(self) -> None:
        """Send READY=1 and, without a watchdog, close the socket. For a service without reload.

        An attacker who controls the process then has one way less to process 1.
        """
        self(ready=1)
        with self._lock:
            self._last_word_said = self.watchdog is None
            self._send_kept()

    def _close(self) -> None:
        manager, self._socket = self._socket, None
        if manager is not None:
            manager.close()

    def reloading(self) -> None:
        """Send RELOADING=1, with the time that Type=notify-reload asks for."""
        self(reloading=1, monotonic_usec=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)


def close_inherited() -> None:
    """Close inherited descriptors, but for standard streams and sockets meant for this process.

    Call this before anything is opened: it would close that, too.
    """
    count = os.environ.get("LISTEN_FDS", "")
    ours = os.environ.get("LISTEN_PID") == str(os.getpid()) and count.isdecimal()
    os.closerange(_FIRST_DESCRIPTOR + (int(count) if ours else 0), 1 << 20)


def passed_sockets() -> dict[str, list[socket.socket]]:
    """The listening sockets that we were started with, by name; clears their variables."""
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    found: dict[str, list[socket.socket]] = {}
    if pid == str(os.getpid()) and count.isdecimal():
        for index in range(int(count)):
            one = socket.socket(fileno=_FIRST_DESCRIPTOR + index)
            one.set_inheritable(False)
            found.setdefault(names[index] if index < len(names) else "", []).append(one)
    return found
