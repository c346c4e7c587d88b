"""Serves the metrics to Prometheus: every connection gets them, whatever it asks for.

Run by the supervisor, as root, within its event loop. It looks only for a blank line in what a
client sends, and keeps no more than the last three octets. A client may be anybody, so its time
is bounded, and so is the number of clients.
"""

import os
import socket
import stat
from collections.abc import Callable

from keyd.linux.unix_socket import bind
from titus_py.between.event_loop import READABLE, WRITABLE, EventLoop
from titus_py.configuration.address import IPAddress, UnixAddress
from titus_py.supervisor.exposition import CONTENT_TYPE

__all__ = ["MetricsAddress", "MetricsServer", "listen_at"]

_CLIENTS = 16
_CLIENT_SECONDS = 5.0
_REQUEST_OCTETS = 8 * 1024
#: How much more is read and dropped: closing with unread octets would send a reset.
_UNREAD_OCTETS = 64 * 1024
#: How long a text is used: it is made no more often than this, however many clients ask.
_TEXT_SECONDS = 0.25
#: How long to leave the listening socket alone when no descriptor is left.
_PAUSE_SECONDS = 1.0
_BACKLOG = 32


class MetricsServer:
    """Serves what ``text`` returns on a listening socket, which it owns from then on."""

    def __init__(self, loop: EventLoop, listener: socket.socket, text: Callable[[], bytes]) -> None:
        self._loop = loop
        self.listener = listener
        self._text = text
        self._answer: bytes | None = None
        #: By descriptor, the oldest client first.
        self._clients: dict[int, _Client] = {}
        self._open = True
        listener.setblocking(False)
        loop.watch(listener.fileno(), self._accept)

    @property
    def clients(self) -> int:
        return len(self._clients)

    def close(self) -> None:
        """Close the socket and every client. A unix socket's file stays: see ``listen_at``."""
        self._pause()
        self._open = False
        self.listener.close()
        for client in list(self._clients.values()):
            client.close()

    def _accept(self) -> None:
        try:
            peer, _ = self.listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            # EMFILE or the like: the client stays in the queue and would wake us for ever.
            self._pause()
            self._loop.after(_PAUSE_SECONDS, self._resume)
            return
        if len(self._clients) >= _CLIENTS:
            # Close the oldest: idle clients must not shut out one that asks.
            next(iter(self._clients.values())).close()
        descriptor = peer.fileno()
        self._clients[descriptor] = _Client(
            self._loop, peer, self._make_answer, lambda: self._clients.pop(descriptor)
        )

    def _pause(self) -> None:
        if self._open:
            self._loop.unwatch(self.listener.fileno())
            self._open = False

    def _resume(self) -> None:
        if self.listener.fileno() >= 0:
            self._loop.watch(self.listener.fileno(), self._accept)
            self._open = True

    def _make_answer(self) -> bytes:
        if self._answer is None:
            body = self._text()
            head = (
                f"HTTP/1.0 200 OK\r\nContent-Type: {CONTENT_TYPE}\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            self._answer = head.encode() + body
            self._loop.after(_TEXT_SECONDS, self._forget_answer)
        return self._answer

    def _forget_answer(self) -> None:
        self._answer = None


class _Client:
    """One client: waits for the end of the request's head, answers, closes."""

    def __init__(
        self,
        loop: EventLoop,
        peer: socket.socket,
        answer: Callable[[], bytes],
        gone: Callable[[], object],
    ) -> None:
        self._loop = loop
        self._socket = peer
        self._answer = answer
        self._gone = gone
        self._tail = b""
        self._heard = 0
        self._left = memoryview(b"")
        peer.setblocking(False)
        loop.watch(peer.fileno(), self._hear)
        self._deadline = loop.after(_CLIENT_SECONDS, self.close)

    def close(self) -> None:
        self._deadline.cancel()
        self._loop.unwatch(self._socket.fileno())
        self._gone()
        self._socket.close()

    def _receive(self, most: int) -> bytes | None:
        """The octets that are there. At end of file or an error, closes and returns None."""
        try:
            octets = self._socket.recv(most)
        except BlockingIOError:
            return b""
        except OSError:
            octets = b""
        if not octets:
            self.close()
            return None
        self._heard += len(octets)
        return octets

    def _hear(self) -> None:
        octets = self._receive(_REQUEST_OCTETS - self._heard)
        if octets:
            end = self._tail + octets
            self._tail = end[-3:]
            if b"\n\r\n" in end or b"\n\n" in end or self._heard >= _REQUEST_OCTETS:
                self._left = memoryview(self._answer())
                self._then(self._send, WRITABLE)
                self._send()

    def _send(self) -> None:
        try:
            sent = self._socket.send(self._left)
            self._left = self._left[sent:]
            if self._left:
                return
            self._socket.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._then(self._await_close)

    def _await_close(self) -> None:
        self._receive(_UNREAD_OCTETS)
        if self._heard > _REQUEST_OCTETS + _UNREAD_OCTETS and self._socket.fileno() >= 0:
            self.close()

    def _then(self, callback: Callable[[], None], events: int = READABLE) -> None:
        self._loop.unwatch(self._socket.fileno())
        self._loop.watch(self._socket.fileno(), callback, events)


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


class MetricsAddress:
    """The metrics server at the configured address, or none."""

    def __init__(self, loop: EventLoop, exposition: Callable[[], bytes]) -> None:
        self._loop = loop
        self._exposition = exposition
        self._server: MetricsServer | None = None
        self.address: IPAddress | UnixAddress | None = None

    @property
    def listener(self) -> socket.socket | None:
        return self._server.listener if self._server else None

    def change(self, address: IPAddress | UnixAddress | None) -> None:
        """Serve the metrics only at this address. Raises OSError; then nothing has changed."""
        if address == self.address:
            return
        try:
            listener = listen_at(address) if address is not None else None
        except OSError as error:
            raise OSError(f"metrics.address: {address}: {error.strerror or error}") from None
        if self._server is not None:
            self._server.close()
            self._server = None
        self.address = address
        if listener is not None:
            self.adopt(address, listener)

    def adopt(self, address: IPAddress | UnixAddress | None, listener: socket.socket) -> None:
        """Serve the metrics on a socket that listens already."""
        self.address = address
        self._server = MetricsServer(self._loop, listener, self._exposition)
