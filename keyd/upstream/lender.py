"""Lends this keyd's keys to other hosts: accepts their streams, and counts what comes of them.

Run by keyd's threads. Our own parent connects, for clients that a virtual host knows by their keys,
and says which one it is (``introduction``). Nobody else is heard. What a client may do, its
``Borrower`` says; what is to be signed is parsed as it is for a worker (``keyd.powers``).
"""

import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from keyd.daemon import Keyd
from keyd.linux.unix_socket import peer_of
from keyd.powers import Key
from keyd.protocol import Operation, Status
from keyd.upstream.awake import Awake
from keyd.upstream.borrower import Borrower, Counts
from keyd.upstream.messages import MAX_STRANGERS
from keyd.upstream.stream import Stream, Streams

__all__ = ["Lender"]

#: A broker has one stream, and another one while a reload goes on.
_MOST_STREAMS_EACH = 8
#: All together, those that nobody has introduced yet among them.
_MOST_STREAMS = 256
#: After so many refusals to one client for one reason, its streams are read on in the next second:
#: a flood costs no more than that, and waits where it comes from.
_MOST_REFUSED = 256
#: How many kinds of refusals are told of in a second, and how much of each.
_TOLD, _DETAIL_CHARACTERS = 8, 200


class Lender(Streams):
    """``told``: ``uids``, of which the first and the last may connect, and those between; and
    ``clients`` (``Borrower.from_json``).
    """

    def __init__(self, told: dict[str, Any], keys: Mapping[bytes, Key], keyd: Keyd) -> None:
        first, last = told["uids"]
        self._uids = range(first, last + 1)
        self._borrowers = {one["name"]: Borrower.from_json(one) for one in told["clients"]}
        self._keyd = keyd
        self.epoll, self.keys = keyd.epoll, keys
        # An epoll of its own, within keyd's: whoever reads a stream, another thread may write.
        self.writable = select.epoll()
        keyd.hear_process(self.writable, self._flush)
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        self._refusals: Counter[tuple[str, str]] = Counter()
        self._last_refused: dict[tuple[str, str], str] = {}
        #: Of ``tick``, what there was no room for.
        self._untold: list[dict[str, Any]] = []
        #: By name, how often a client was refused that no [[keyd.client]] is for; "" is all others.
        self._strangers: Counter[str] = Counter()
        self._told: list[Counts] = []
        self._awake = Awake(time.monotonic())
        self._lends = True
        #: The supervisor's, each with the descriptors that come with it.
        self.orders: Mapping[str, Callable[[list[int]], None]] = {
            "lend": self._lend,
            "lend no more": self._lend_no_more,
        }

    def _lend(self, descriptors: list[int]) -> None:
        """Accept from this listener; the supervisor says so again now and then."""
        for descriptor in descriptors:
            kind = socket.AF_UNIX, socket.SOCK_STREAM, 0
            listener = socket.socket(*kind, fileno=descriptor)
            if self._listener is not None:
                listener.close()
                continue
            try:
                self._keyd.hear_listener(listener, self._accepted, lambda: not self._lends)
            except OSError as error:
                # ENOMEM, ENOSPC: until it is told again.
                self._keyd.shortage.say(error.errno)
                listener.close()
            else:
                self._listener = listener

    def _lend_no_more(self, descriptors: list[int]) -> None:
        """Another keyd accepts from now on. What was asked is answered."""
        del descriptors
        # The listener stays open: another thread may be about to accept.
        self._lends = False
        for stream in self._now():
            stream.leave()

    def _accepted(self, descriptor: int, _: bool) -> None:
        endpoint = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptor)
        endpoint.setblocking(False)
        uid = peer_of(endpoint).uid
        if uid not in self._uids:
            self.refused("", "stranger", Status.NOT_GRANTED, f"a connection from uid {uid}")
            endpoint.close()
            return
        stream = Stream(endpoint, self)
        with self._lock:
            room = self._lends and len(self._keyd.streams) < _MOST_STREAMS
            if room:
                self._keyd.streams[stream.fileno()] = stream
        if room:
            try:
                self.writable.register(stream, select.EPOLLONESHOT)
                self.epoll.register(stream, select.EPOLLIN | select.EPOLLONESHOT)
                return
            except OSError as error:
                # ENOMEM, ENOSPC: the other host connects again.
                stream.close()
                detail = f"a stream that cannot be watched: {error.strerror}"
        else:
            endpoint.close()
            detail = f"more than {_MOST_STREAMS} streams"
        if self._lends:
            self.refused("", "exhausted", Status.EXHAUSTED, detail)

    def introduced(self, name: str) -> Borrower | None:
        borrower = self._borrowers.get(name)
        if borrower is None:
            detail = "a client that no [[keyd.client]] is for"
            if not name:
                detail = "a client without a name: is send_proxy its virtual host's v2-tls-cert?"
            self.refused(name, "stranger", Status.NOT_GRANTED, detail)
        elif not borrower.began(_MOST_STREAMS_EACH):
            detail = f"more than {_MOST_STREAMS_EACH} streams"
            self.refused(name, "exhausted", Status.EXHAUSTED, detail)
        else:
            return borrower
        return None

    def done(self, borrower: Borrower, operation: Operation, seconds: float) -> None:
        borrower.done()
        self._keyd.tally.done(operation, seconds)

    def refused(self, name: str, why: str, status: Status, detail: str) -> bool:
        self._keyd.tally.refused(status)
        borrower = self._borrowers.get(name)
        if borrower is not None:
            borrower.refused(why)
        with self._lock:
            if borrower is None:
                is_known = name in self._strangers or len(self._strangers) < MAX_STRANGERS
                self._strangers[name if is_known else ""] += 1
            self._refusals[name, why] += 1
            self._last_refused[name, why] = detail[:_DETAIL_CHARACTERS]
            return self._refusals[name, why] >= _MOST_REFUSED

    def _flush(self) -> bool:
        for descriptor, _ in self.writable.poll(0):
            stream = self._keyd.streams.get(descriptor)
            if stream is not None:
                stream.flush()
        return False

    def over(self, stream: Stream) -> None:
        with self._lock:
            del self._keyd.streams[stream.fileno()]
        if stream.borrower is not None:
            stream.borrower.ended()

    def tick(self) -> Iterator[dict[str, Any]]:
        """What was refused since the last call, to each client and for each reason: an event.

        To be called about once a second. Events that cannot be told are to be kept (``keep``).
        """
        self._awake.look(time.monotonic())
        for stream in self._now():
            stream.tick(self._awake.since)
        with self._lock:
            refusals, self._refusals = self._refusals, Counter()
            last, self._last_refused = self._last_refused, {}
        untold, self._untold = self._untold, []
        for event in untold:
            kind = event["client_name"], event["status"]
            refusals[kind] += event["count"]
            last.setdefault(kind, event["attempted"])
        # Not most_common(): it imports heapq, and nothing can be imported here any more.
        most = sorted(refusals.items(), key=lambda refused: refused[1], reverse=True)
        for (name, why), count in most[:_TOLD]:
            told = {"client_name": name, "status": why, "count": count}
            yield told | {"attempted": last[name, why]}

    def keep(self, event: dict[str, Any]) -> None:
        """Have an event of this ``tick`` told with the next one."""
        self._untold.append(event)

    def news(self) -> list[Counts] | None:
        """Each client's counts, if they have changed since the last call."""
        now = [borrower.counts for borrower in self._borrowers.values()]
        with self._lock:
            strangers = self._strangers.items()
            now += [Counts(name, 0, 0, {"stranger": count}) for name, count in strangers]
        if now == self._told:
            return None
        self._told = now
        return now

    def _now(self) -> list[Stream]:
        with self._lock:
            return list(self._keyd.streams.values())
