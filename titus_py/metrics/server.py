"""Serves the metrics to Prometheus: every connection gets them, whatever it asks for.

Run by the metrics server, which is confined. It looks only for a blank line in what a client sends,
and keeps no more than the last three octets. A client may be anybody, so its time is bounded, and
so is the number of clients.
"""

import socket
from collections.abc import Callable

from titus_py.between.event_loop import READABLE, WRITABLE, EventLoop

__all__ = ["MetricsServer"]

_HEAD = (
    "HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
    "Content-Length: {}\r\nConnection: close\r\n\r\n"
)
_CLIENTS = 16
_CLIENT_SECONDS = 5.0
_REQUEST_OCTETS = 8 * 1024
#: How much more is read and dropped: closing with unread octets would send a reset.
_UNREAD_OCTETS = 64 * 1024
#: How long a text is used: it is asked for no more often than this, however many clients ask.
_TEXT_SECONDS = 0.25
#: How long to leave the listening socket alone when no descriptor is left.
_PAUSE_SECONDS = 1.0


class MetricsServer:
    """Answers the clients of a listening socket with the text that ``take`` is given.

    ``want`` is called when a client needs a text and there is none, or only an old one.
    """

    def __init__(
        self, loop: EventLoop, listener: socket.socket, want: Callable[[], object]
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._want = want
        self._answer: bytes | None = None
        self._wanted = False
        #: By descriptor, the oldest client first.
        self._clients: dict[int, _Client] = {}
        listener.setblocking(False)
        loop.watch(listener.fileno(), self._accept)

    @property
    def clients(self) -> int:
        return len(self._clients)

    def take(self, text: bytes) -> None:
        """Answer all who wait with this text, and whoever asks within a moment."""
        self._wanted = False
        self._answer = _HEAD.format(len(text)).encode() + text
        self._loop.after(_TEXT_SECONDS, self._forget_answer)
        for client in list(self._clients.values()):
            if client.waits:
                client.answer(self._answer)

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            # EMFILE or the like: the client stays in the queue and would wake us for ever.
            # ``rewatch`` would hear it whatever the events, where the supervisor has shut it down.
            self._loop.unwatch(self._listener.fileno())
            self._loop.after(
                _PAUSE_SECONDS, lambda: self._loop.watch(self._listener.fileno(), self._accept)
            )
            return
        if len(self._clients) >= _CLIENTS:
            # Close the oldest: idle clients must not shut out one that asks.
            next(iter(self._clients.values())).close()
        descriptor = peer.fileno()
        try:
            client = _Client(
                self._loop, peer, self._has_asked, lambda: self._clients.pop(descriptor)
            )
        except OSError:
            # No watch is left for it (epoll_ctl(2)).
            peer.close()
        else:
            self._clients[descriptor] = client

    def _has_asked(self, client: "_Client") -> None:
        if self._answer is not None:
            client.answer(self._answer)
        elif not self._wanted:
            self._wanted = True
            self._want()

    def _forget_answer(self) -> None:
        self._answer = None


class _Client:
    """One client: hears the request's head to its end, waits for the text, sends it, closes."""

    def __init__(
        self,
        loop: EventLoop,
        peer: socket.socket,
        asked: Callable[["_Client"], None],
        gone: Callable[[], object],
    ) -> None:
        self._loop = loop
        self._socket = peer
        self._asked = asked
        self._gone = gone
        #: It has asked, and has no answer yet.
        self.waits = False
        self._tail = b""
        self._heard = 0
        self._left = memoryview(b"")
        peer.setblocking(False)
        loop.watch(peer.fileno(), self._hear)
        self._deadline = loop.after(_CLIENT_SECONDS, self.close)

    def answer(self, octets: bytes) -> None:
        self.waits = False
        self._left = memoryview(octets)
        self._then(self._send, WRITABLE)

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
                self.waits = True
                # Until there is a text, only that the connection breaks (EPOLLHUP, EPOLLERR).
                self._then(self.close, 0)
                self._asked(self)

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
        self._loop.rewatch(self._socket.fileno(), callback, events)
