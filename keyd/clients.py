"""The clients of ``keyd listen``: each connects, asks, is answered, and may ask again for a while.

Run by keyd's threads. A client is trusted with nothing but what the socket's mode says: it may
connect. Nobody has seen whose handshake it asks for. Most have asked by the time they are
accepted, and are answered there and then. The process of a server that has many handshakes keeps
its connection, and keyd waits once for each of them: nobody is accepted, nothing is closed.

keyd never needs to keep a connection, nor one that has asked nothing yet: a provider whose request
cannot be sent any more makes another one, and asks again. So these are ended first, where there is
anything to save. They end by being shut down for reading: what has been sent before is answered,
and no more can be sent.
"""

import resource
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from math import inf

from keyd.channel import Refused, fulfil, granted_by
from keyd.daemon import Keyd
from keyd.linux.unix_socket import Peer, has_ended, peer_of
from keyd.powers import Key, Whole, takes_milliseconds
from keyd.protocol import (
    KEY_IN_REQUEST,
    MAX_REQUEST_OCTETS,
    Grants,
    Malformed,
    Operation,
    Refusal,
    Reply,
    Request,
    Status,
)

__all__ = ["Clients"]

#: How long a client may take to ask, and ask again: whether it may connect is seen anew then.
_LIFETIME_SECONDS = 60.0
#: How many may be silent at once. An honest one asks as soon as it has connected. One who connects
#: and says nothing takes the places of its like, and not keyd's descriptors.
_MOST_SILENT = 1000
#: How many may be idle. There are fewer processes that have many handshakes.
_MOST_KEPT = 256
_KIND = socket.AF_UNIX, socket.SOCK_SEQPACKET, 0


class Clients:
    """Whoever connects, for what ``grants`` say; ``refused`` is told of refusals, and to whom."""

    def __init__(
        self,
        keyd: Keyd,
        keys: Mapping[bytes, Key],
        grants: Grants,
        refused: Callable[[Refusal, Peer], None],
    ) -> None:
        self._keyd, self._keys, self._grants = keyd, keys, grants
        self._refused = refused
        #: Those that have not asked yet, and until when they may.
        self._silent: dict[socket.SocketType, float] = {}
        #: Those that have been answered, and until when they may ask again: the one that has been
        #: idle for longest is first.
        self._kept: dict[socket.SocketType, float] = {}
        #: Those that epoll(7) has.
        self._heard: set[socket.SocketType] = set()
        # A quarter of the descriptors is left for those that ask.
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_silent = min(_MOST_SILENT, descriptors // 2)
        self._most_kept = min(_MOST_KEPT, descriptors // 4)
        self._leaving = False

    def accepted(self, descriptor: int, puts_off: bool) -> Callable[[], None] | None:
        """Answer this client, if it has asked, unless that is put off.

        What takes long is returned, to be called once others can be accepted: a request for a slow
        key, during which other threads can run (it is without Python's lock).
        """
        # Without Python's own way to make it: that asks an enumeration what is known here.
        client = socket.SocketType(*_KIND, descriptor)
        self._keyd.underway.add(descriptor)
        if puts_off:
            self._await(client)
            return None
        try:
            message = client.recv(MAX_REQUEST_OCTETS + 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._await(client)
        except ConnectionResetError:
            self._leave(client)
        else:
            if takes_milliseconds(self._keys.get(message[KEY_IN_REQUEST])):
                return partial(self._answer, client, message)
            self._answer(client, message)
        return None

    def _await(self, client: socket.SocketType) -> None:
        """Hear what it asks in its turn."""
        self._silent[client] = time.monotonic() + _LIFETIME_SECONDS
        self._begin_to_hear(client)
        _end_first(self._silent, self._most_silent)
        self._end_if_leaving(client)

    def tick(self) -> None:
        """Wake whoever serves those that may ask no more: they read an end of file, and close it.

        To be called about once a second.
        """
        now = time.monotonic()
        for clients in (self._silent, self._kept):
            for client, deadline in list(clients.items()):
                if now > deadline:
                    _end(client)

    def leave(self) -> None:
        """End those that have asked nothing, now that keyd leaves. Others are still answered."""
        self._leaving = True
        for client in [*self._silent, *self._kept]:
            _end(client)

    def _begin_to_hear(self, client: socket.SocketType) -> None:
        self._heard.add(client)
        try:
            self._keyd.hear_client(client, partial(self._hear, client))
        except OSError as error:
            # ENOMEM, ENOSPC: the client sees that it is left.
            self._keyd.shortage.say(error.errno)
            self._heard.discard(client)
            for clients in (self._silent, self._kept):
                clients.pop(client, None)
            self._leave(client)

    def _unhear(self, client: socket.SocketType) -> None:
        """By the thread that serves it."""
        if client in self._heard:
            self._heard.discard(client)
            self._keyd.unhear(client)

    def _hear(self, client: socket.SocketType) -> None:
        """What a client says that epoll(7) has been told of. It is armed again after this."""
        try:
            message = client.recv(MAX_REQUEST_OCTETS + 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionResetError:
            message = b""
        if takes_milliseconds(self._keys.get(message[KEY_IN_REQUEST])):
            self._keyd.lead.make_way()
        # One that is nowhere has been ended, to make room.
        deadline = self._silent.pop(client, None) or self._kept.pop(client, 0.0)
        self._answer(client, message, deadline)

    def _answer(
        self, client: socket.SocketType, message: bytes, deadline: float | None = None
    ) -> None:
        """Answer a client, which may ask again until this time: one that epoll(7) has."""
        if not message and has_ended(client):
            self._leave(client)
            return
        started = time.monotonic()
        try:
            request = Request.decode(message)
            granted = granted_by(self._grants, request, None)
            result = fulfil(self._keys, Whole(request, granted, b"", inf), None)
        except Malformed as error:
            self._refuse(client, Refused(Status.MALFORMED, str(error)))
        except Refused as refused:
            self._refuse(client, refused)
        else:
            if isinstance(result, bytes):
                if self._done(client, request.operation, started, result):
                    self._keep(client, deadline)
                else:
                    self._leave(client)
            else:
                # Whoever hears of it next is the one who is told.
                self._unhear(client)
                result(partial(self._told, client, request.operation, started))

    def _told(
        self, client: socket.SocketType, operation: Operation, started: float, result: bytes | str
    ) -> None:
        """Answer a request with its result that took a while, or with why there is none."""
        if isinstance(result, str):
            failed = Refused(Status.FAILED, f"{operation.name.lower()}: {result}")
            self._refuse(client, failed)
            return
        self._done(client, operation, started, result)
        self._leave(client)

    def _done(
        self, client: socket.SocketType, operation: Operation, started: float, result: bytes
    ) -> bool:
        """Answer a request with its result; returns whether the answer was sent."""
        sent = self._reply(client, Reply(Status.DONE, result))
        # After the reply, so that the client does not wait for the tally.
        self._keyd.tally.done(operation, time.monotonic() - started)
        return sent

    def _keep(self, client: socket.SocketType, deadline: float | None) -> None:
        """Wait for its next request, until this time. If it has none, epoll(7) does not have it."""
        if deadline is not None:
            self._kept[client] = deadline
        else:
            self._kept[client] = time.monotonic() + _LIFETIME_SECONDS
            self._begin_to_hear(client)
        _end_first(self._kept, self._most_kept)
        self._end_if_leaving(client)

    def _end_if_leaving(self, client: socket.SocketType) -> None:
        """To be called once it is among those that ``leave`` ends: perhaps only since then."""
        if self._leaving:
            _end(client)

    def _refuse(self, client: socket.SocketType, refused: Refused) -> None:
        self._keyd.tally.refused(refused.status)
        self._refused(Refusal(0, refused.status, refused.detail), peer_of(client))
        self._reply(client, Reply(refused.status))
        self._leave(client)

    def _reply(self, client: socket.SocketType, answer: Reply) -> bool:
        """Whether it could be sent. It is lost if the client is gone, or memory is short."""
        try:
            client.send(answer.encode(), socket.MSG_DONTWAIT)
        except OSError:
            return False
        return True

    def _leave(self, client: socket.SocketType) -> None:
        self._unhear(client)
        descriptor = client.fileno()
        # Before it is closed: another one may get its number at once.
        self._keyd.ended(descriptor)
        client.close()


def _end(client: socket.SocketType) -> None:
    """Let it ask no more. Whoever serves it answers what it has asked, and reads the end."""
    with suppress(OSError):
        client.shutdown(socket.SHUT_RD)


def _end_first(clients: dict[socket.SocketType, float], most: int) -> None:
    """End those of them that came first, if there are more than so many."""
    too_many = len(clients) - most
    if too_many > 0:
        # In a copy: another thread may hear one of them meanwhile, also the first.
        for client in list(clients)[:too_many]:
            if clients.pop(client, None) is not None:
                _end(client)
