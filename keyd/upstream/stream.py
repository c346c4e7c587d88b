"""One borrower's stream: asks in, answers out, in any order.

Run by keyd's threads: one of them reads a stream at a time, and any may answer on it. The borrower
is another host's keyd, and may be an attacker's program by now. The kernel's buffer is the queue,
but for one piece of it: a message is taken once a thread has time for it. While answers are not
taken, nothing is read.
"""

import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

from keyd.channel import Refused, fulfil, witness
from keyd.linux.descriptors import if_any, passes
from keyd.powers import Key, Whole, may_ask, takes_milliseconds
from keyd.protocol import MAX_REPLY_OCTETS, Malformed, Operation, Power, Reply, Status
from keyd.transcript import Witnessed
from keyd.upstream.borrower import Borrower
from keyd.upstream.introduction import client_name, missing_octets
from keyd.upstream.messages import (
    BUSY_SECONDS,
    MAX_FROM_BORROWER_OCTETS,
    MAX_IN_FLIGHT,
    QUIET_SECONDS,
    SILENCE_SECONDS,
    Answer,
    Ask,
    Assembler,
    Greeting,
    decode_from_borrower,
)
from keyd.words import say

__all__ = ["NOT_LENT", "Stream", "Streams"]

#: Beside the names of keyd's statuses, why an ask is refused: the key is not lent to this client.
NOT_LENT = "not_lent"
#: How long the header may take: it is written before keyd can accept.
_HEADER_SECONDS = 5.0
#: How many pieces and messages one thread takes before it looks at anything else.
_AT_ONCE = 32
#: How much is read at once: whole asks, in one call.
_PIECE_OCTETS = 65536
#: Answers that the kernel does not take: more than there are for all asks in flight.
_MOST_UNSENT_OCTETS = 2 * MAX_IN_FLIGHT * MAX_REPLY_OCTETS


class Streams(ABC):
    """What streams have in common, and who is told of what happens to them."""

    epoll: select.epoll
    #: Tells of streams that have room for answers again (``Stream.flush``).
    writable: select.epoll
    keys: Mapping[bytes, Key]

    @abstractmethod
    def introduced(self, name: str) -> Borrower | None:
        """Whose stream it is; None to end it."""

    @abstractmethod
    def done(self, borrower: Borrower, operation: Operation, seconds: float) -> None:
        """An operation was done, that took so long."""

    @abstractmethod
    def refused(self, name: str, why: str, status: Status, detail: str) -> bool:
        """Something was refused; returns whether it is enough for this second."""

    @abstractmethod
    def over(self, stream: "Stream") -> None:
        """It is about to be closed."""


class Stream:
    def __init__(self, endpoint: socket.socket, streams: Streams) -> None:
        self._socket = endpoint
        self._streams = streams
        self.borrower: Borrower | None = None
        self._header = b""
        self._assembler = Assembler(MAX_FROM_BORROWER_OCTETS)
        self._begun = self._sent = self._heard = time.monotonic()
        #: Whether something was received since the last ``tick``.
        self._spoke = False
        #: Held while anything below is looked at.
        self._lock = threading.Lock()
        #: No thread reads it, and none will before ``_resume``.
        self._paused = False
        self._closed = False
        self._leaves = self._ended = False
        #: Too much was refused: nothing more is read before the next ``tick``.
        self._rests = False
        self._in_flight = 0
        #: Greetings that the borrower has not said yet that it has heard.
        self._greetings = 0
        self._unsent = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    def arm(self) -> None:
        """Have a thread call ``hear`` once there is something to hear; by the one that has heard.

        Nothing more is read while answers wait, while it rests, or before it leaves.
        """
        with self._lock:
            self._paused = bool(self._unsent) or self._rests or self._leaves
            if not (self._paused or self._closed):
                self._arm()

    def _arm(self) -> None:
        events = select.EPOLLIN | select.EPOLLONESHOT
        if self._assembler.has_next():
            # It was read already. Nothing need come for it, and an answer to it can be sent.
            events |= select.EPOLLOUT
        self._streams.epoll.modify(self._socket, events)

    def _resume(self) -> None:
        """Read on, unless it rests. Holds the lock."""
        if self._paused and not self._rests:
            self._paused = False
            self._arm()

    def hear(self) -> Callable[[], None] | None:
        """Take what has come; returns what takes long, to be done once it is armed again."""
        more = True
        try:
            for _ in range(_AT_ONCE):
                if not self._goes_on():
                    return None
                if (message := self._assembler.next()) is not None:
                    ask = decode_from_borrower(message)
                    if ask is None:
                        self._greeting_heard()
                    elif (slow := self._take(ask)) is not None:
                        return slow
                elif more:
                    more = self._receive()
                else:
                    return None
        except Malformed as error:
            name = self.borrower.name if self.borrower else ""
            self._streams.refused(name, "malformed", Status.MALFORMED, str(error))
            self.close()
        return None

    def tick(self, awake_since: float) -> None:
        """About once a second: end it if there is no header in time, or nobody at its other end.

        Greet, if it is quiet. And read on, if it has rested. ``awake_since`` is when this process
        last went on after it had been stopped.
        """
        now, gone = time.monotonic(), False
        with self._lock:
            if self._closed:
                return
            if self._spoke:
                self._spoke, self._heard = False, now
            self._rests = False
            if not (self._unsent or self._leaves):
                self._resume()
            if self.borrower is None:
                if now - max(self._begun, awake_since) > _HEADER_SECONDS:
                    self._end()
            elif now - max(self._heard, awake_since) > SILENCE_SECONDS:
                gone = not self._ended
                self._end()
            elif not self._unsent:
                quiet = BUSY_SECONDS if self._in_flight else QUIET_SECONDS
                if now - self._sent > quiet:
                    self._greet(self.borrower)
        if gone:
            name = self._borrower.name
            say(f"a stream of {name} is ended: it has said nothing for {SILENCE_SECONDS:g} s")

    def leave(self) -> None:
        """Answer what was asked, take nothing more, and end."""
        with self._lock:
            self._leaves = True
            self._end_if_done()

    # --- reading ------------------------------------------------------------------

    def _goes_on(self) -> bool:
        """Whether anything more is taken now."""
        if self._ended and not self._closed:
            # What has come before the end is not looked at.
            self.close()
        return not (self._closed or self._leaves or self._rests or self._unsent)

    def _receive(self) -> bool:
        """Read a piece; returns False if there is no more to read now."""
        missing = missing_octets(self._header) if self.borrower is None else 0
        octets = if_any(lambda: self._socket.recv(missing or _PIECE_OCTETS), b"")
        if octets is None:
            return False
        if not octets:
            self.close()
            return False
        self._spoke = True
        if not missing:
            self._assembler.add(octets)
            return len(octets) == _PIECE_OCTETS
        self._header += octets
        if missing_octets(self._header):
            return True
        name = client_name(self._header)
        self.borrower = self._streams.introduced(name) if name is not None else None
        if self.borrower is None:
            self.close()
            return False
        with self._lock:
            self._greet(self.borrower)
        return True

    def _greeting_heard(self) -> None:
        with self._lock:
            if not self._greetings:
                raise Malformed("an answer to no greeting")
            self._greetings -= 1

    def _take(self, ask: Ask) -> Callable[[], None] | None:
        came = time.monotonic()
        with self._lock:
            self._in_flight += 1
        if takes_milliseconds(self._streams.keys.get(ask.request.key)):
            return partial(self._perform, ask, came)
        self._perform(ask, came)
        return None

    # --- answering ----------------------------------------------------------------

    def _perform(self, ask: Ask, came: float) -> None:
        borrower = self._borrower
        try:
            if self._in_flight > MAX_IN_FLIGHT:
                raise Refused(Status.EXHAUSTED, f"more than {MAX_IN_FLIGHT} asks at once")
            if not borrower.take():
                raise Refused(Status.EXHAUSTED, f"more than {borrower.rate}")
            _check_time(ask, came)
            granted, client = self._granted(ask)
            until = came + ask.deadline_ms / 1000
            whole = Whole(ask.request, granted, ask.client_hello, until)
            result = fulfil(self._streams.keys, whole, client)
        except Refused as refused:
            self._refuse(ask, refused)
            return
        if isinstance(result, bytes):
            self._told(ask, came, result)
        else:
            result(partial(self._told, ask, came))

    def _granted(self, ask: Ask) -> tuple[frozenset[Power], Witnessed | None]:
        """What is done with the key for this borrower's client, and what is known of that."""
        lent = self._borrower.grants.get(ask.request.key)
        if lent is None:
            raise Refused(Status.NOT_GRANTED, f"{_what(ask)}, which is not lent to it")
        granted = lent & ask.powers
        if not may_ask(ask.request.operation, granted):
            raise Refused(Status.NOT_GRANTED, _what(ask))
        if Power.SIGN_TLS13_CLIENT in granted:
            # What is lent for that is lent for nothing else. No ClientHello has come from a peer.
            return granted, None
        client = witness(ask.client_hello)
        if not isinstance(client, Witnessed):
            status, reason = client
            raise Refused(status, f"{_what(ask)} for {reason}")
        return granted, client

    def _told(self, ask: Ask, came: float, result: bytes | str) -> None:
        """Answer with a result, or with why there is none."""
        operation = ask.request.operation
        try:
            if isinstance(result, str):
                raise Refused(Status.FAILED, f"{operation.name.lower()}: {result}")
            _check_time(ask, came)
        except Refused as refused:
            self._refuse(ask, refused)
            return
        self._answer(ask.id, Reply(Status.DONE, result))
        self._streams.done(self._borrower, operation, time.monotonic() - came)

    def _refuse(self, ask: Ask, refused: Refused) -> None:
        borrower = self._borrower
        why = refused.status.name.lower()
        if refused.status is Status.NOT_GRANTED and ask.request.key not in borrower.grants:
            why = NOT_LENT
        if self._streams.refused(borrower.name, why, refused.status, refused.detail):
            self._rests = True
        self._answer(ask.id, Reply(refused.status))

    @property
    def _borrower(self) -> Borrower:
        if self.borrower is None:
            raise RuntimeError("nobody has introduced the client of this stream")
        return self.borrower

    def _answer(self, number: int, reply: Reply) -> None:
        with self._lock:
            self._in_flight -= 1
            if not self._closed:
                self._send(Answer(number, reply).encode())
                self._end_if_done()

    def _greet(self, borrower: Borrower) -> None:
        """Holds the lock."""
        self._greetings += 1
        self._send(Greeting(frozenset(borrower.grants)).encode())

    def _send(self, octets: bytes) -> None:
        """Send, or keep for later what the kernel does not take. Holds the lock."""
        self._sent = time.monotonic()
        waits = bool(self._unsent)
        self._unsent += octets
        if not waits:
            self._send_unsent()
        elif len(self._unsent) > _MOST_UNSENT_OCTETS:
            self._end()

    def _send_unsent(self) -> None:
        """Send what the kernel takes, and have the rest sent once there is room. Holds the lock."""
        try:
            del self._unsent[: self._socket.send(self._unsent, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            pass
        except OSError as error:
            self._unsent.clear()
            # If it has ended, the thread that reads it learns that.
            if passes(error):
                # ENOBUFS, ENOMEM: an answer is lost, or a part of one. The other host asks again.
                self._end()
        if self._unsent:
            self._streams.writable.modify(self._socket, select.EPOLLOUT | select.EPOLLONESHOT)

    def flush(self) -> None:
        """Send what was kept: there is room."""
        with self._lock:
            if self._closed or not self._unsent:
                return
            self._send_unsent()
            if self._unsent:
                return
            if self._leaves:
                self._end_if_done()
            else:
                self._resume()

    # --- ending -------------------------------------------------------------------

    def _end_if_done(self) -> None:
        """Holds the lock."""
        if self._leaves and not (self._in_flight or self._unsent):
            self._end()

    def _end(self) -> None:
        """Have the thread that reads it close it. Holds the lock."""
        self._ended, self._leaves, self._rests = True, False, False
        self._unsent.clear()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if not self._closed:
            self._resume()

    def close(self) -> None:
        """By the thread that reads it, or was to read it."""
        with self._lock:
            # Forgotten before it is closed: another one may get its number at once.
            self._streams.over(self)
            self._closed = True
            self._unsent.clear()
            self._socket.close()


def _what(ask: Ask) -> str:
    return f"{ask.request.operation.name.lower()} with key {ask.request.key.hex()}"


def _check_time(ask: Ask, came: float) -> None:
    """Raises Refused for an ask whose answer comes too late."""
    if time.monotonic() - came >= ask.deadline_ms / 1000:
        what = ask.request.operation.name.lower()
        raise Refused(Status.EXPIRED, f"{what} after its {ask.deadline_ms} ms")
