"""Keys that other hosts' keyds have: which of them is asked, and what comes of it.

Run by keyd's threads. What is asked has passed keyd's grammar, and passes the upstream's again. So
each ask has all with it that it was judged by. Nothing here waits: an answer is an event of its
own, and an ask without one has a deadline.

An ask goes to one upstream, and to the next one where the first has no connection or does not have
the key, refuses, ends, or is slow. Where there is none but one may soon be there, or has enough to
answer, it is kept for a moment: keyd starts before the way to its upstreams does.
"""

import itertools
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from keyd.linux.descriptors import passes, receive_if_any
from keyd.powers import KeyElsewhere, Told, Whole
from keyd.protocol import SignatureScheme, Status
from keyd.pss import PSSPublicKey
from keyd.reference import id_and_key_of
from keyd.upstream.awake import Awake
from keyd.upstream.connection import Connection, Loop
from keyd.upstream.connector import (
    ABSENT,
    CONNECTED,
    FAILED,
    LOST,
    MAX_MESSAGE_OCTETS,
    WANTED,
)
from keyd.upstream.messages import HEARD, MAX_IN_FLIGHT, Answer, Ask, Greeting
from keyd.upstream.state import CONNECTING, ORPHANED, READY, UpstreamState
from keyd.words import say

__all__ = ["Broker", "UpstreamKey"]

#: In seconds: how long an ask may take in all; how long one upstream may take before the next one
#: is asked as well; how long after its deadline an ask without an answer ends the connection.
_MOST_SECONDS, _SLOW_SECONDS, _OVERDUE_SECONDS = 6.0, 1.0, 5.0
#: How long an upstream that has just been lost, or was never there when it was first asked for,
#: may soon be there. But where nobody listens for one that was never there, it is as good as known.
_HOPE_SECONDS = 3.0
#: How many lost connections make an ask stay away from the upstreams that it was with.
_MOST_LOST = 2
#: How many asks may be kept for that, or for one that has enough to answer, and how large they may
#: be all together.
_MOST_KEPT, _MOST_KEPT_OCTETS = 1024, 16 * 1024 * 1024
#: How often a refusal of an upstream's is logged at most, in seconds.
_REFUSAL_INTERVAL = 10.0
_TOLD_CHARACTERS = 200


class _Asked:
    """An ask that somebody waits for, until it is ``over``."""

    def __init__(self, key: bytes, whole: Whole, told: Told) -> None:
        self.key, self.whole, self.told = key, whole, told
        self.octets = len(whole.client_hello) + len(whole.request.messages or b"")
        self.deadline = min(whole.deadline, time.monotonic() + _MOST_SECONDS)
        self.over = False
        #: When the upstream that was asked last was asked.
        self.asked_at = 0.0
        #: Those that it is with, those that it was with, and what they said.
        self.waits_for = 0
        self.tried: list[_Upstream] = []
        self.why: list[str] = []
        #: How many connections have ended that it was asked on.
        self.lost = 0

    def answer(self, said: bytes | str) -> Callable[[], None] | None:
        """What is to be called once the lock is released."""
        if self.over:
            return None
        self.over = True
        return partial(self.told, said)


class _Upstream:
    """One upstream: its connection, while there is one, and what it was asked on it."""

    def __init__(self, path: str) -> None:
        self.name = f"unix:{path}"
        self.connection: Connection | None = None
        self.keys: frozenset[bytes] = frozenset()
        self.greeted = False
        #: By id. One that is over is here until it is answered: the other end counts it as well.
        self.asks: dict[int, _Asked] = {}
        #: When the first of them was asked, of those since it last had none.
        self.asked_at = 0.0
        #: Whether the last ask that was due had no answer in time.
        self.slow = False
        self._begun = time.monotonic()
        #: Until when it may soon be there; None: nobody has asked for it yet.
        self.hoped_for_until: float | None = None
        #: Why it is not usable: while it is tried again, still for the reason of the last time.
        self.why = "has not said yet which keys it has"
        self.done = self.failed = 0
        self._refusal_told = -_REFUSAL_INTERVAL

    def can_be_asked(self, key: bytes) -> bool:
        # One whose end is about to be seen may soon be there again.
        is_up = self.connection is not None and not self.connection.ended_for
        return is_up and key in self.keys and len(self.asks) < MAX_IN_FLIGHT

    def state(self, wanted: Iterable[bytes], now: float) -> UpstreamState:
        if self.greeted:
            missing = [key for key in wanted if key not in self.keys]
            state = f"does not lend key sha256:{missing[0].hex()}" if missing else READY
            if missing[1:]:
                state += f", and {len(missing) - 1} more"
        elif now < max(self.hoped_for_until or 0.0, self._begun + _HOPE_SECONDS):
            state = CONNECTING
        else:
            state = self.why[:_TOLD_CHARACTERS]
        in_flight = sum(not asked.over for asked in self.asks.values())
        return UpstreamState(self.name, state, in_flight, self.done, self.failed)

    def tell_refusal(self, status: Status) -> None:
        now = time.monotonic()
        if now - self._refusal_told >= _REFUSAL_INTERVAL:
            self._refusal_told = now
            say(f"{self.name} refused: {status.name} (its log says what)")


class UpstreamKey(KeyElsewhere):
    """A key that other hosts have, for any request or, with ``whole``, for one."""

    def __init__(
        self,
        broker: "Broker",
        identity: bytes,
        public: PublicKeyTypes | PSSPublicKey,
        whole: Whole | None = None,
    ) -> None:
        self._broker, self._id, self._public = broker, identity, public
        self._whole = whole

    def public_key(self) -> PublicKeyTypes | PSSPublicKey:
        return self._public

    def within(self, whole: Whole) -> "UpstreamKey":
        return UpstreamKey(self._broker, self._id, self._public, whole)

    def ask(self, scheme: SignatureScheme, octets: bytes, told: Told) -> None:
        del scheme, octets  # They are in the whole request.
        if self._whole is None:
            told("another host judges requests, and not octets alone")
        else:
            self._broker.ask(self._id, self._whole, told)


class Broker:
    """All upstreams, in the order in which they are asked.

    ``connector`` is the process that connects to them. ``references`` are those of the keys.
    """

    def __init__(
        self, connector: socket.socket, paths: Sequence[str], references: Iterable[str]
    ) -> None:
        self._connector = connector
        self._upstreams = [_Upstream(path) for path in paths]
        self.keys = {
            identity: UpstreamKey(self, identity, public)
            for identity, public in map(id_and_key_of, references)
        }
        self._loop: Loop | None = None
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._kept: deque[_Asked] = deque()
        self._kept_octets = 0
        self._told: list[UpstreamState] = []
        self._awake = Awake(time.monotonic())
        #: What the process that connects is to be told once there is room for it: of each upstream
        #: at most that its connection is lost (it makes no other one before it knows), and that it
        #: is wanted (once).
        self._untold: deque[bytes] = deque()
        #: That process has ended.
        self._orphaned = False

    def serve(self, loop: Loop) -> None:
        """Hear connections from now on."""
        self._loop = loop
        loop.hear_process(self._connector, self._hear_connector)

    def ask(self, key: bytes, whole: Whole, told: Told) -> None:
        """Ask the upstreams; ``told`` is called once, by this thread or by another."""
        asked = _Asked(key, whole, told)
        with self._lock:
            then = self._ask_next(asked)
        if then is not None:
            then()

    def news(self) -> list[UpstreamState] | None:
        """How the upstreams are, if that has changed since the last call. About once a second.

        What has waited for too long goes to the next one, or is answered.
        """
        now = time.monotonic()
        with self._lock:
            then = self._look_at_clock(now)
            states = [upstream.state(self.keys, now) for upstream in self._upstreams]
        if self._orphaned:
            states = [one._replace(state=ORPHANED) for one in states]
        for answer in then:
            answer()
        if states == self._told:
            return None
        self._told = states
        return states

    def _ask_next(self, asked: _Asked) -> Callable[[], None] | None:
        """Ask the best upstream that was not asked yet, or keep it, or give it up.

        Returns what is to be called once the lock is released.
        """
        if asked.over:
            return None
        for upstream in sorted(self._upstreams, key=lambda one: one.slow):
            if upstream not in asked.tried and upstream.can_be_asked(asked.key):
                if (flush := self._send(asked, upstream)) is not None:
                    return flush
                asked.why.append(f"{upstream.name} takes nothing more")
        if asked.waits_for:
            return None
        if self._may_be_kept(asked):
            self._kept.append(asked)
            self._kept_octets += asked.octets
            return None
        return asked.answer(self._why_not(asked))

    def _send(self, asked: _Asked, upstream: _Upstream) -> Callable[[], None] | None:
        whole, now = asked.whole, time.monotonic()
        number = next(self._ids)
        left = max(0, int((asked.deadline - now) * 1000))
        ask = Ask(number, left, whole.granted, whole.client_hello, whole.request)
        asked.tried.append(upstream)
        if upstream.connection is None or not upstream.connection.send(ask.encode()):
            return None
        if not upstream.asks:
            upstream.asked_at = now
        upstream.asks[number] = asked
        asked.waits_for += 1
        asked.asked_at = now
        return upstream.connection.flush

    def _may_be_kept(self, asked: _Asked) -> bool:
        now = time.monotonic()
        # All of them: each that is wanted is wanted from now on.
        may_answer = [
            asked.key in one.keys if one.greeted else self._may_come(one, now)
            for one in self._upstreams
            if one not in asked.tried
        ]
        return (
            any(may_answer)
            and now < asked.deadline
            and len(self._kept) < _MOST_KEPT
            and self._kept_octets + asked.octets <= _MOST_KEPT_OCTETS
        )

    def _may_come(self, upstream: _Upstream, now: float) -> bool:
        """Whether asks are kept for it: keyd may be there long before the way to it can be."""
        if upstream.hoped_for_until is None:
            upstream.hoped_for_until = now + _HOPE_SECONDS
            if upstream.connection is None:
                # It was tried, but perhaps seconds ago.
                self._tell_connector(WANTED, upstream)
        return now < upstream.hoped_for_until

    def _ask_kept(self) -> list[Callable[[], None] | None]:
        """Ask again for each that is kept, or keep it longer, or give it up."""
        kept, self._kept, self._kept_octets = self._kept, deque(), 0
        return [self._ask_next(asked) for asked in kept]

    def _why_not(self, asked: _Asked) -> str:
        """Of each upstream, why it has not signed."""
        reasons = list(asked.why)
        for one in self._upstreams:
            if one in asked.tried:
                continue
            why = one.why
            if one.greeted:
                why = f"has {MAX_IN_FLIGHT} asks to answer already"
                if asked.key not in one.keys:
                    why = "does not lend this key"
            reasons.append(f"{one.name}: {why}")
        return "; ".join(reasons)[:_TOLD_CHARACTERS]

    # --- what comes ----------------------------------------------------------------

    def _hear_connector(self) -> bool:
        """Take a connection, or why there is none; returns whether that process has ended."""
        said = receive_if_any(self._connector, MAX_MESSAGE_OCTETS, 2)
        if said is None:
            return False
        message, descriptors = said
        upstream = self._meant(message, descriptors)
        if upstream is None:
            for one in descriptors:
                os.close(one)
            why = "talks nonsense" if message else "has ended"
            say(f"upstreams cannot be connected to again: the process for that {why}")
            self._orphaned = True
            return True
        if message[:1] in (FAILED, ABSENT):
            upstream.why = f"cannot be connected to: {message[2:].decode(errors='replace')}"
            if message[:1] == ABSENT:
                self._give_up_hope(upstream)
        elif len(descriptors) == 2 and self._loop is not None:
            kind = socket.AF_UNIX, socket.SOCK_STREAM, 0
            reader, writer = (socket.socket(*kind, fileno=one) for one in descriptors)
            connection = Connection(reader, writer, self._loop, self._lock)
            with self._lock:
                upstream.connection = connection
            try:
                self._loop.hear_process(reader, partial(self._hear, upstream, connection))
            except OSError as error:
                # ENOMEM, ENOSPC: nothing was asked on it.
                connection.ended_for = f"its connection cannot be watched: {error.strerror}"
                if upstream.why != connection.ended_for:
                    say(f"{upstream.name}: {connection.ended_for}")
                with self._lock:
                    self._lost(upstream, connection)
                reader.close()
        else:
            for one in descriptors:
                os.close(one)
            upstream.why = "no descriptor was left for its connection: raise LimitNOFILE="
            with self._lock:
                self._tell_connector(LOST, upstream, False)
        return False

    def _give_up_hope(self, upstream: _Upstream) -> None:
        """Nobody is there: what is kept goes to others, or is answered."""
        with self._lock:
            upstream.hoped_for_until = 0.0
            then = self._ask_kept()
        for answer in then:
            if answer is not None:
                answer()

    def _meant(self, message: bytes, descriptors: Sequence[int]) -> _Upstream | None:
        """Which upstream the connector speaks of; None where it says what is not its to say.

        It was told of every connection that has ended, and connects to nothing that is connected.
        """
        known = message[:1] in (CONNECTED, FAILED, ABSENT) and len(message) > 1
        if not known or message[1] >= len(self._upstreams):
            return None
        upstream = self._upstreams[message[1]]
        if message[:1] != CONNECTED:
            fits = not descriptors
        else:
            fits = len(message) == 2 and all(map(_is_unix_stream, descriptors))
        return upstream if fits and upstream.connection is None else None

    def _hear(self, upstream: _Upstream, connection: Connection) -> bool:
        """Take what an upstream has said; returns whether nothing more is heard of it."""
        said = connection.hear()
        then: list[Callable[[], None] | None] = []
        with self._lock:
            for one in said:
                if isinstance(one, Greeting):
                    if connection.send(HEARD):
                        then.append(connection.flush)
                    then += self._greeted(upstream, one)
                elif not self._answered(upstream, one, then):
                    connection.ended_for = "it answers what it was not asked"
                    break
            over = bool(connection.ended_for)
            if over:
                then += self._lost(upstream, connection)
        for answer in then:
            if answer is not None:
                answer()
        return over

    def _greeted(self, upstream: _Upstream, greeting: Greeting) -> list[Callable[[], None] | None]:
        upstream.keys, upstream.greeted = greeting.keys, True
        return self._ask_kept()

    def _answered(
        self, upstream: _Upstream, answer: Answer, then: list[Callable[[], None] | None]
    ) -> bool:
        """Returns whether that was asked."""
        asked = upstream.asks.pop(answer.id, None)
        if asked is None:
            return False
        upstream.slow = False
        asked.waits_for -= 1
        if self._kept:
            kept = self._kept.popleft()
            self._kept_octets -= kept.octets
            then.append(self._ask_next(kept))
        status = answer.reply.status
        if status is Status.DONE:
            upstream.done += 1
            then.append(asked.answer(answer.reply.payload))
            return True
        if asked.over:
            # It was too late, which was counted.
            return True
        upstream.failed += 1
        upstream.tell_refusal(status)
        asked.why.append(f"{upstream.name}: {status.name}")
        then.append(self._ask_next(asked))
        return True

    def _lost(self, upstream: _Upstream, connection: Connection) -> list[Callable[[], None] | None]:
        connection.close()
        asks, upstream.asks = upstream.asks, {}
        served, upstream.greeted = upstream.greeted, False
        upstream.connection, upstream.keys, upstream.slow = None, frozenset(), False
        upstream.why = connection.ended_for
        if served:
            upstream.hoped_for_until = time.monotonic() + _HOPE_SECONDS
        self._tell_connector(LOST, upstream, served)
        for asked in asks.values():
            asked.waits_for -= 1
            asked.lost += 1
            upstream.failed += not asked.over
            asked.why.append(f"{upstream.name}: {upstream.why}")
            # It may be there again in a moment: a reload of its own ends connections.
            if asked.lost <= _MOST_LOST:
                asked.tried.remove(upstream)
        return [self._ask_next(asked) for asked in asks.values()]

    def _tell_connector(self, what: bytes, upstream: _Upstream, *more: int) -> None:
        """Holds the lock."""
        self._untold.append(what + bytes((self._upstreams.index(upstream), *more)))
        self._tell_untold()

    def _tell_untold(self) -> None:
        """Tell the process that connects what it is to be told, as far as there is room.

        Without room, or memory, the rest is told about a second later. Holds the lock.
        """
        while self._untold:
            try:
                self._connector.send(self._untold[0], socket.MSG_DONTWAIT)
            except OSError as error:
                if passes(error):
                    return
                # It has ended, which is said.
                self._untold.clear()
                for one in self._upstreams:
                    if one.connection is None:
                        one.why = ORPHANED
                return
            self._untold.popleft()

    # --- what does not come ----------------------------------------------------------

    def _look_at_clock(self, now: float) -> list[Callable[[], None]]:
        self._tell_untold()
        then = self._ask_kept()
        self._awake.look(now)
        since = self._awake.since
        for upstream in self._upstreams:
            if upstream.connection is not None:
                asked_at = upstream.asked_at if upstream.asks else None
                upstream.connection.look_at_clock(asked_at, since)
            for asked in list(upstream.asks.values()):
                overdue = now > max(asked.deadline, since) + _OVERDUE_SECONDS
                if overdue and upstream.connection is not None:
                    upstream.connection.end("it leaves asks unanswered")
                if asked.over:
                    continue
                if now > asked.deadline:
                    upstream.failed += 1
                    then.append(asked.answer(self._too_late(asked, upstream)))
                elif now - asked.asked_at > _SLOW_SECONDS:
                    upstream.slow = True
                    then.append(self._ask_next(asked))
        return [answer for answer in then if answer is not None]

    def _too_late(self, asked: _Asked, upstream: _Upstream) -> str:
        return "; ".join([*asked.why, f"{upstream.name}: no answer in time"])[:_TOLD_CHARACTERS]


def _is_unix_stream(descriptor: int) -> bool:
    try:
        one = socket.socket(fileno=descriptor)
    except OSError:
        return False
    kind = one.family, one.type
    one.detach()
    return kind == (socket.AF_UNIX, socket.SOCK_STREAM)
