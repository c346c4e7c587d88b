"""The clients of ``keyd listen``: each connects, asks once, is answered, and is left.

Run by keyd's threads. A client is trusted with nothing but what the socket's mode says: it may
connect. Nobody has seen whose handshake it asks for. Most have asked by the time they are
accepted, and are answered there and then: with no channel, and without being told to epoll(7).
"""

import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from math import inf

from keyd.channel import Refused, fulfil, granted_by
from keyd.daemon import Keyd
from keyd.linux.unix_socket import has_ended, peer_of
from keyd.powers import Key, Whole, takes_milliseconds
from keyd.protocol import (
    KEY_ID_OCTETS,
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

#: How long a client may take to ask.
_PATIENCE_SECONDS = 60.0
#: How many may be silent at once. An honest one asks as soon as it has connected. One who connects
#: and says nothing takes the places of its like, and not keyd's descriptors.
_MOST_SILENT = 1000
#: Where a request has the key's id (``protocol``).
_KEY_IN_REQUEST = slice(4, 4 + KEY_ID_OCTETS)
_KIND = socket.AF_UNIX, socket.SOCK_SEQPACKET, 0


class Clients:
    """Whoever connects, for what ``grants`` say; ``refused`` is told of refusals, and to whom."""

    def __init__(
        self,
        keyd: Keyd,
        keys: Mapping[bytes, Key],
        grants: Grants,
        refused: Callable[[Refusal, int], None],
    ) -> None:
        self._keyd, self._keys, self._grants = keyd, keys, grants
        self._refused = refused
        #: Those that have not asked yet, and until when they may.
        self._silent: dict[socket.SocketType, float] = {}

    def accepted(self, descriptor: int) -> Callable[[], None] | None:
        """Answer this client, if it has asked.

        What takes long is returned, to be called once others can be accepted: a request for an RSA
        key, during which other threads can run (it is without Python's lock).
        """
        # Without Python's own way to make it: that asks an enumeration what is known here.
        client = socket.SocketType(*_KIND, descriptor)
        self._keyd.underway.add(descriptor)
        try:
            message = client.recv(MAX_REQUEST_OCTETS + 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._silent[client] = time.monotonic() + _PATIENCE_SECONDS
            self._keyd.hear_client(client, partial(self._hear, client))
            if len(self._silent) > _MOST_SILENT:
                self._hurry_the_first()
        except ConnectionResetError:
            self._leave(client)
        else:
            if takes_milliseconds(self._keys.get(message[_KEY_IN_REQUEST])):
                return partial(self._answer, client, message)
            self._answer(client, message)
        return None

    def tick(self) -> None:
        """Wake whoever serves those that may ask no more: they read an end of file, and close it.

        To be called about once a second.
        """
        now = time.monotonic()
        for client, deadline in list(self._silent.items()):
            if now > deadline:
                with suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)

    def _hurry_the_first(self) -> None:
        """Have whoever serves it answer it now, if it has asked, and close it in any case."""
        # In a copy: another thread may hear one of them meanwhile, also the first.
        for client in list(self._silent)[:1]:
            if self._silent.pop(client, None) is not None:
                with suppress(OSError):
                    client.shutdown(socket.SHUT_RD)

    def _hear(self, client: socket.SocketType) -> None:
        """What a client says that had not asked when it was accepted."""
        try:
            message = client.recv(MAX_REQUEST_OCTETS + 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionResetError:
            message = b""
        self._keyd.unhear(client)
        expired = time.monotonic() > self._silent.pop(client, inf)
        if expired and message:
            self._refuse(client, Refused(Status.EXPIRED, "a request after the client's time"))
        else:
            self._answer(client, message)

    def _answer(self, client: socket.SocketType, message: bytes) -> None:
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
                self._told(client, request.operation, started, result)
            else:
                result(partial(self._told, client, request.operation, started))

    def _told(
        self, client: socket.SocketType, operation: Operation, started: float, result: bytes | str
    ) -> None:
        """Answer a request with its result, or with why there is none."""
        if isinstance(result, str):
            failed = Refused(Status.FAILED, f"{operation.name.lower()}: {result}")
            self._refuse(client, failed)
            return
        self._reply(client, Reply(Status.DONE, result))
        # After the reply, so that the client does not wait for the tally.
        self._keyd.tally.done(operation, time.monotonic() - started)
        self._leave(client)

    def _refuse(self, client: socket.SocketType, refused: Refused) -> None:
        self._keyd.tally.refused(refused.status)
        self._refused(Refusal(0, refused.status, refused.detail), peer_of(client).pid)
        self._reply(client, Reply(refused.status))
        self._leave(client)

    def _reply(self, client: socket.SocketType, answer: Reply) -> None:
        """It is lost if the client is gone, or memory is short."""
        with suppress(OSError):
            client.send(answer.encode(), socket.MSG_DONTWAIT)

    def _leave(self, client: socket.SocketType) -> None:
        descriptor = client.fileno()
        # Before it is closed: another one may get its number at once.
        self._keyd.ended(descriptor)
        client.close()
