"""What systemd and a service say to each other (sd_notify(3), sd_listen_fds(3)).

Run by the supervisor, and by a keyd on its own. Without systemd, nothing happens.
"""

import os
import socket
import time
from contextlib import suppress

__all__ = ["Notifier", "close_inherited", "passed_sockets"]

_FIRST_DESCRIPTOR = 3
_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")


class Notifier:
    """A socket to the service manager, where there is one. Never blocks.

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
        #: How often to notify the watchdog, in seconds; None if there is no watchdog.
        self.watchdog: float | None = None
        watched_pid = os.environ.pop("WATCHDOG_PID", str(os.getpid()))
        microseconds = os.environ.pop("WATCHDOG_USEC", "")
        if microseconds.isdecimal() and watched_pid == str(os.getpid()):
            # Half of the watchdog's time, as sd_watchdog_enabled(3) advises.
            self.watchdog = int(microseconds) / 2_000_000

    def __call__(self, **fields: object) -> None:
        """Send variables such as READY=1; their names are given in lower case."""
        if self._socket is not None:
            text = "\n".join(f"{name.upper()}={value}" for name, value in fields.items())
            # A manager that does not listen must not hold us up.
            with suppress(OSError):
                self._socket.send(text.encode())

    def ready(self) -> None:
        """Send READY=1 and, without a watchdog, close the socket. For a service without reload.

        An attacker who controls the process then has one way less to process 1.
        """
        self(ready=1)
        if self.watchdog is None and self._socket is not None:
            self._socket.close()
            self._socket = None

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
