"""One connection's way to keyd: its terms, as its parent has stated them, and what they allow.

Run by keyd's threads, by one of them at a time for each channel. Who is at the other end is trusted
with nothing; neither is the client, whose ClientHello the parent has passed on as it was seen.
"""

import socket
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

from cryptography.exceptions import InternalError

from keyd.client_hello import InvalidClientHello, TooManyExtensions
from keyd.powers import (
    Client,
    Key,
    KeyElsewhere,
    Later,
    NotGranted,
    NotTLS,
    Whole,
    may_ask,
    perform,
)
from keyd.protocol import (
    MAX_REQUEST_IN_HANDSHAKE_OCTETS,
    MAX_REQUEST_OCTETS,
    Done,
    Grants,
    Malformed,
    Open,
    Operation,
    Power,
    Refusal,
    Reply,
    Request,
    Status,
)
from keyd.sites import Sites
from keyd.transcript import InvalidFlight, SecondHelloDiffers, Witnessed

__all__ = ["Channel", "Refused", "fulfil", "granted_by", "reply", "witness"]

#: How long an expired channel is kept for the answer to a late request, in seconds: for longer than
#: a parent leaves a worker that has not done its handshake in time.
_OVERDUE_SECONDS = 3.0
_NO_POWERS = frozenset[Power]()


class Refused(Exception):
    """A request that is not done; the text says what was asked."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class Channel:
    """A channel, and what is left of its terms.

    ``grants`` that are Sites are for the virtual host that the client's name selects. Others are
    for whatever the client has said: nobody has seen it. ``judged_again`` are the keys whose
    requests somebody else judges, too: who gets the client's first message, which is kept for that.
    """

    __slots__ = (
        "_client",
        "_client_hello",
        "_deadline",
        "_grants",
        "_operations",
        "connection",
        "hung_up",
        "most_octets",
        "record",
        "socket",
    )

    def __init__(
        self,
        terms: Open,
        grants: Sites | Grants,
        endpoint: socket.socket,
        record: Callable[[Refusal | Done], None],
        judged_again: Collection[bytes] = (),
    ) -> None:
        self.socket = endpoint
        self.record = record
        self.connection = terms.connection
        #: Nothing more is answered; it is closed once its worker has seen that.
        self.hung_up = False
        self._deadline = time.monotonic() + terms.lifetime_ms / 1000
        self._operations = terms.operations
        #: What is known of the client, or why nothing is done for it.
        self._client = witness(terms.client_hello) if isinstance(grants, Sites) else None
        self._client_hello = b""
        #: Of the longest request that it may bring, and one more.
        self.most_octets = 1 + MAX_REQUEST_OCTETS
        self._grants: Grants = {}
        if not isinstance(grants, Sites):
            self._grants = grants
        elif isinstance(self._client, Witnessed):
            # A set in use does not change: they are what they will be at the request.
            self._grants = grants.select(self._client.hello.server_name)
            self.most_octets = 1 + MAX_REQUEST_IN_HANDSHAKE_OCTETS
            if judged_again and any(key in judged_again for key in self._grants):
                self._client_hello = terms.client_hello

    @property
    def expired(self) -> bool:
        return time.monotonic() > self._deadline

    @property
    def overdue(self) -> bool:
        """Whether no honest worker can be there any more."""
        return time.monotonic() > self._deadline + _OVERDUE_SECONDS

    def hang_up(self) -> None:
        """Let its worker know that no answer comes, from this keyd or another.

        For that, there is no need of memory: the worker reads an end of file, of a socket that is
        not closed.
        """
        self.hung_up = True
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def grant(self, keys: Mapping[bytes, Key], message: bytes) -> tuple[Operation, bytes | Later]:
        """Check a request against the terms, count it, and perform it. Raises Refused."""
        try:
            request = Request.decode(message)
        except Malformed as error:
            raise Refused(Status.MALFORMED, str(error)) from None
        if self.expired:
            raise Refused(Status.EXPIRED, f"{_word(request)} after the channel's time")
        if self._operations == 0:
            raise Refused(Status.EXHAUSTED, f"{_word(request)} beyond the channel's operations")
        self._operations -= 1
        client = self._client
        if isinstance(client, tuple):
            status, reason = client
            raise Refused(status, f"{_word(request)} for {reason}")
        granted = granted_by(self._grants, request, client)
        whole = Whole(request, granted, self._client_hello, self._deadline)
        return request.operation, fulfil(keys, whole, client)


def granted_by(grants: Grants, request: Request, client: Witnessed | None) -> frozenset[Power]:
    """What may be done with the key, for this client or for one that nobody has seen.

    Raises Refused for nothing.
    """
    granted = grants.get(request.key, _NO_POWERS)
    if not may_ask(request.operation, granted):
        detail = f"{_word(request)} with key {request.key.hex()}"
        if client is not None:
            detail += f" for a client that asks for {client.hello.server_name or 'no name'}"
        raise Refused(Status.NOT_GRANTED, detail)
    return granted


def fulfil(keys: Mapping[bytes, Key], whole: Whole, witnessed: Witnessed | None) -> bytes | Later:
    """Do what is asked for this client, or for one that nobody has seen. Raises Refused."""
    request, granted = whole.request, whole.granted
    key = keys.get(request.key)
    if key is None:
        raise Refused(Status.UNKNOWN_KEY, f"{_word(request)} with key {request.key.hex()}")
    if isinstance(key, KeyElsewhere):
        key = key.within(whole)
    client = None
    if witnessed is not None:
        transcript_hash = _transcript_hash(witnessed, request.messages)
        client = Client(witnessed.hello, transcript_hash)
    try:
        return perform(request.operation, key, request.parameter, request.payload, granted, client)
    except NotGranted as error:
        detail = f"{_word(request)} of {error} with key {request.key.hex()}"
        raise Refused(Status.NOT_GRANTED, detail) from None
    except NotTLS as error:
        raise Refused(Status.NOT_TLS, f"{_word(request)} of {error}") from None
    except InternalError as error:
        raise Refused(Status.FAILED, f"{_word(request)}: {error}") from None


def _word(request: Request) -> str:
    return request.operation.name.lower()


def reply(channel: Channel, answer: Reply) -> str | None:
    """Send a reply; returns why that cannot be done, if its worker is still there and waits."""
    try:
        channel.socket.send(answer.encode(), socket.MSG_DONTWAIT)
    except (BrokenPipeError, ConnectionResetError):
        return None
    except OSError as error:
        # ENOBUFS, ENOMEM. EMSGSIZE, where net.core.wmem_default is less than a long signature.
        return f"the answer cannot be sent: {error.strerror}"
    return None


def witness(message: bytes) -> Witnessed | tuple[Status, str]:
    """What is known of a client by its ClientHello, or why nothing is done for it."""
    if not message:
        return Status.UNWITNESSED, "a client whose ClientHello was not seen"
    try:
        return Witnessed(message)
    except TooManyExtensions as error:
        return Status.UNWITNESSED, str(error)
    except InvalidClientHello as error:
        return Status.NOT_TLS, str(error)


def _transcript_hash(client: Witnessed, messages: bytes | None) -> bytes | None:
    """The hash of the handshake with this client, if its messages have come. Raises Refused."""
    if messages is None:
        return None
    if not messages:
        raise Refused(Status.UNWITNESSED, "sign in a handshake whose messages are too long")
    try:
        return client.transcript_hash(messages)
    except SecondHelloDiffers as error:
        raise Refused(Status.UNWITNESSED, f"sign after {error}") from None
    except InvalidFlight as error:
        raise Refused(Status.NOT_TLS, f"sign after {error}") from None
