"""Where the metrics are served: the listening socket, and the text for the process that serves it.

Run by the supervisor, which makes both and hears no client: a process without privilege does
(``titus_py/metrics/life.py``). That process may be controlled by a client, so it gets a text only
so often, whatever it asks for.
"""

import os
import socket
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from keyd.linux.sealed import sealed_file
from keyd.linux.unix_socket import bind
from titus_py.between.event_loop import EventLoop, Timer
from titus_py.between.metrics_text import MAX_OCTETS, TEXT, WANTED
from titus_py.between.unprivileged import Malformed
from titus_py.configuration.address import IPAddress, UnixAddress
from titus_py.supervisor.record import Event
from titus_py.supervisor.unprivileged import UnprivilegedProcess

__all__ = ["MetricsAddress", "listen_at"]

#: A text is made no more often than this.
_TEXT_SECONDS = 0.25
#: How soon to try again to make one, when no descriptor is left.
_PAUSE_SECONDS = 1.0
_BACKLOG = 32


class MetricsAddress:
    """The metrics at the configured address, or nowhere.

    ``settings`` is for the process that serves them (``UnprivilegedProcess``); ``text`` makes them.
    """

    def __init__(
        self,
        loop: EventLoop,
        event: Event,
        settings: Callable[[], Mapping[str, object]],
        text: Callable[[], bytes],
    ) -> None:
        self._loop = loop
        self._text = text
        self.process = UnprivilegedProcess(
            loop, event, "metrics", settings, MAX_OCTETS, self._descriptors
        )
        self.address: IPAddress | UnixAddress | None = None
        self.listener: socket.socket | None = None
        self._made = 0.0
        #: A text is wanted, and about to be sent.
        self._due: Timer | None = None
        self.process.heard = self._hear
        self.process.changed = self._send_none

    def change(self, address: IPAddress | UnixAddress | None) -> None:
        """Serve the metrics only at this address. Raises OSError; then nothing has changed."""
        if address == self.address:
            return
        try:
            listener = listen_at(address) if address is not None else None
        except OSError as error:
            raise OSError(f"metrics.address: {address}: {error.strerror or error}") from None
        if self.listener is not None:
            self.process.dismiss()
            self._send_none()
            # The process has the same socket, and may take a moment to end.
            with suppress(OSError):
                self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
        self.adopt(address, listener)

    def adopt(
        self, address: IPAddress | UnixAddress | None, listener: socket.socket | None
    ) -> None:
        """Serve the metrics on a socket that listens already, or nowhere."""
        self.address, self.listener = address, listener
        self.serve()

    def serve(self) -> None:
        """Have a process serve them, if there is an address and none does yet."""
        if self.listener is not None:
            self.process.start()

    def stop(self) -> None:
        """Serve them no more, but keep the listening socket; the process has ended then."""
        self.process.stop()
        self._send_none()

    def _descriptors(self) -> dict[str, int]:
        return {} if self.listener is None else {"listener": self.listener.fileno()}

    def _hear(self, message: bytes) -> None:
        if message != WANTED or self._due is not None:
            raise Malformed(f"{len(message)} octets")
        if self.process.owes:
            # Texts that it never takes would fill the memory.
            raise Malformed("a text is wanted, and the last one was not taken")
        pause = max(0.0, self._made + _TEXT_SECONDS - time.monotonic())
        self._due = self._loop.after(pause, self._send)

    def _send(self) -> None:
        self._due, self._made = None, time.monotonic()
        try:
            text = sealed_file("metrics", self._text())
            try:
                self.process.send(TEXT, [text])
            finally:
                os.close(text)
        except OSError:
            # No descriptor is left, or the process is about to be found dead.
            self._due = self._loop.after(_PAUSE_SECONDS, self._send)

    def _send_none(self) -> None:
        """The process that wanted a text has ended."""
        if self._due is not None:
            self._due.cancel()
            self._due = None


def listen_at(address: IPAddress | UnixAddress) -> socket.socket:
    """A listening socket for the metrics; raises OSError.

    Only its owner and its group can connect to a unix socket. One that an earlier run left, and
    that nobody listens on, is replaced.
    """
    if isinstance(address, IPAddress):
        listener = socket.socket(address.family, socket.SOCK_STREAM)
    else:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if isinstance(address, IPAddress):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if address.family == socket.AF_INET6:
                # As with [[listen]]: "::" is every address of both families.
                v6_only = address.host != "::"
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6_only)
            listener.bind(address.sockaddr())
        else:
            _remove_stale(address.path)
            bind(listener, address.path, 0o660)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket's file if nobody listens there. Raises OSError if that cannot be done."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except (FileNotFoundError, BlockingIOError):
        pass
