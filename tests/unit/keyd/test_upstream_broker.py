"""A key of another host's: who is asked, and what comes of it when that one misbehaves.

The test is the other host, and the process that connects to it. keyd's own loop is run by hand.
"""

import errno
import gc
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from integration.hellos import certificate_verify, client_hello, flight
from integration.watches import without_watches

from keyd.daemon import Keyd
from keyd.linux.descriptors import send_descriptors
from keyd.protocol import (
    ANY_NAME,
    MAX_REPLY_OCTETS,
    Done,
    Grant,
    Open,
    Operation,
    Power,
    Refusal,
    Reply,
    Request,
    SignatureScheme,
    Status,
)
from keyd.reference import key_id, reference_pem
from keyd.sites import Sites
from keyd.upstream import broker as broker_module
from keyd.upstream import connection as connection_module
from keyd.upstream.awake import Awake
from keyd.upstream.broker import Broker
from keyd.upstream.connector import ABSENT, CONNECTED, FAILED, LOST, WANTED
from keyd.upstream.messages import (
    HEARD,
    MAX_FROM_BORROWER_OCTETS,
    Answer,
    Ask,
    Assembler,
    Greeting,
    decode_from_borrower,
)
from keyd.upstream.state import ORPHANED, READY

KEY = ec.generate_private_key(ec.SECP256R1())
ID = key_id(KEY.public_key())
HELLO, FLIGHT = client_hello(), flight()
OCTETS = certificate_verify(HELLO, FLIGHT)
SIGN = Request(Operation.SIGN, SignatureScheme.ecdsa_secp256r1_sha256, ID, OCTETS, messages=FLIGHT)
POWERS = frozenset({Power.SIGN_TLS13})


class Lender:
    """Another host: an upstream's other end."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self._assembler = Assembler(MAX_FROM_BORROWER_OCTETS)
        #: How many greetings were heard at the other end.
        self.heard = 0

    def say(self, octets: bytes) -> None:
        self.end.sendall(octets)

    def lend(self, *keys: bytes) -> None:
        self.say(Greeting(frozenset(keys or (ID,))).encode())

    def asked(self) -> list[Ask]:
        """What it has been asked by now."""
        with suppress(BlockingIOError):
            while True:
                self._assembler.add(self.end.recv(1_000_000, socket.MSG_DONTWAIT))
        said = list(map(decode_from_borrower, self._assembler.messages()))
        self.heard += said.count(None)
        return [one for one in said if one is not None]

    def sign(self, ask: Ask) -> None:
        signature = KEY.sign(ask.request.payload, ec.ECDSA(hashes.SHA256()))
        self.say(Answer(ask.id, Reply(Status.DONE, signature)).encode())

    def refuse(self, ask: Ask, status: Status) -> None:
        self.say(Answer(ask.id, Reply(status)).encode())


class Host:
    """A keyd that has no key of its own, and two upstreams."""

    def __init__(self) -> None:
        ours, self.connector = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.broker = Broker(ours, ["/a", "/b"], [reference_pem(KEY.public_key()).decode()])
        self.keyd = Keyd(dict(self.broker.keys), judged_again=self.broker.keys)
        self.broker.serve(self.keyd)
        self.sites = Sites()
        self.sites.add(Grant(0, ANY_NAME, ID, POWERS))
        self.reports: list[Refusal | Done] = []
        self.connector.setblocking(False)
        self.opened: list[socket.socket] = [self.connector]

    def connect(self, number: int) -> Lender:
        """As the process does that connects to upstreams."""
        ours, theirs = socket.socketpair()
        with ours:
            message = CONNECTED + bytes((number,))
            send_descriptors(self.connector, message, [ours.fileno()] * 2)
        self.opened.append(theirs)
        self.turn()
        return Lender(theirs)

    def turn(self) -> None:
        """Handle what there is to be handled."""
        for _ in range(20):
            self.keyd._take_turn(0)

    def opened_channel(self, lifetime_ms: int = 60_000) -> socket.socket:
        worker, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        worker.setblocking(False)
        self.opened.append(worker)
        terms = Open(7, lifetime_ms, operations=1, grants=0, client_hello=HELLO)
        self.keyd.open(terms, self.sites, keyds, self.reports.append)
        return worker

    def request(self, octets: bytes = SIGN.encode(), lifetime_ms: int = 60_000) -> socket.socket:
        worker = self.opened_channel(lifetime_ms)
        worker.send(octets)
        self.turn()
        return worker

    def answer(self, worker: socket.socket) -> Reply:
        self.turn()
        return Reply.decode(worker.recv(MAX_REPLY_OCTETS))

    def signed(self, worker: socket.socket) -> None:
        reply = self.answer(worker)
        assert reply.status is Status.DONE
        KEY.public_key().verify(reply.payload, OCTETS, ec.ECDSA(hashes.SHA256()))

    def refused(self, worker: socket.socket) -> str:
        assert self.answer(worker).status is Status.FAILED
        report = self.reports[-1]
        assert isinstance(report, Refusal)
        return report.detail

    def look_at_clock(self) -> list[str]:
        """The upstreams' states."""
        self.broker.news()
        self.turn()
        now = time.monotonic()
        return [one.state([ID], now).state for one in self.broker._upstreams]

    def seconds_pass(self, seconds: float, stopped: bool = False) -> list[str]:
        """Since anything was heard and asked. ``stopped``: this process is stopped meanwhile."""
        for upstream in self.broker._upstreams:
            assert upstream.connection is not None
            upstream.connection._heard -= seconds
            upstream.asked_at -= seconds
            for asked in upstream.asks.values():
                asked.deadline -= seconds
        self.broker._awake = Awake(time.monotonic() - (seconds if stopped else 0.0))
        return self.look_at_clock()

    def lost(self) -> bytes:
        return self.connector.recv(100)


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    for one in host.opened:
        one.close()
    host.turn()


@pytest.fixture
def hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is hoped for that is not there."""
    monkeypatch.setattr(broker_module, "_HOPE_SECONDS", 0.0)


def test_what_is_asked_has_all_that_it_was_judged_by(host: Host) -> None:
    lender = host.connect(0)
    lender.lend()
    worker = host.request()
    (ask,) = lender.asked()
    assert (ask.powers, ask.client_hello, ask.request) == (POWERS, HELLO, SIGN)
    assert 0 < ask.deadline_ms <= 6000
    lender.sign(ask)
    host.signed(worker)
    assert host.reports == [Done(7, Operation.SIGN)]
    assert host.look_at_clock() == [READY, "connecting"]


def test_many_are_in_flight_and_answered_in_any_order(host: Host) -> None:
    lender = host.connect(0)
    lender.lend()
    workers = [host.request() for _ in range(300)]
    asks: list[Ask] = []
    for _ in range(10):
        asks += lender.asked()
        host.turn()
    assert len(asks) == 256
    for ask in reversed(asks):
        lender.sign(ask)
        host.turn()
    for ask in lender.asked():
        lender.sign(ask)
    for worker in workers:
        host.signed(worker)


def test_what_is_no_tls_is_never_asked_for(host: Host) -> None:
    lender = host.connect(0)
    lender.lend()
    worker = host.request(SIGN._replace(payload=b"a certificate").encode())
    assert host.answer(worker).status is Status.NOT_TLS
    assert not lender.asked()


@pytest.mark.usefixtures("hopeless")
def test_with_no_upstream_the_refusal_says_why() -> None:
    host = Host()
    host.connector.send(FAILED + b"\0No such file or directory")
    host.turn()
    detail = host.refused(host.request())
    assert detail == (
        "sign: unix:/a: cannot be connected to: No such file or directory; "
        "unix:/b: has not said yet which keys it has"
    )


def test_an_ask_waits_for_an_upstream_that_may_soon_be_there(host: Host) -> None:
    worker = host.request()
    lender = host.connect(1)
    lender.lend()
    host.turn()
    lender.sign(*lender.asked())
    host.signed(worker)


def test_all_are_wanted_at_once_that_are_not_there(host: Host) -> None:
    """They were waited for one after the other."""
    host.request()
    assert [host.lost(), host.lost()] == [WANTED + b"\0", WANTED + b"\1"]
    begun = [one.hoped_for_until for one in host.broker._upstreams]
    assert None not in begun
    host.request()
    assert [one.hoped_for_until for one in host.broker._upstreams] == begun
    with pytest.raises(BlockingIOError):
        host.lost()


def test_the_refusal_comes_as_soon_as_it_is_known_that_nobody_is_there(host: Host) -> None:
    worker = host.request()
    host.connector.send(ABSENT + b"\0No such file or directory")
    # This one may pass: its listen queue was full, say.
    host.connector.send(FAILED + b"\1Resource temporarily unavailable")
    host.turn()
    with pytest.raises(BlockingIOError):
        host.answer(worker)
    host.connector.send(ABSENT + b"\1Connection refused")
    assert host.refused(worker) == (
        "sign: unix:/a: cannot be connected to: No such file or directory; "
        "unix:/b: cannot be connected to: Connection refused"
    )
    # The next one is refused at once, until one is there.
    assert "Connection refused" in host.refused(host.request())
    lender = host.connect(0)
    lender.lend()
    host.turn()
    worker = host.request()
    lender.sign(*lender.asked())
    host.signed(worker)


def test_one_that_was_lost_is_waited_for_also_where_the_other_is_absent(host: Host) -> None:
    lender = host.connect(0)
    lender.lend()
    host.turn()
    lender.end.close()
    host.turn()
    worker = host.request()
    assert [host.lost(), host.lost()] == [LOST + b"\0\1", WANTED + b"\1"]
    host.connector.send(ABSENT + b"\1No such file or directory")
    host.turn()
    again = host.connect(0)
    again.lend()
    host.turn()
    again.sign(*again.asked())
    host.signed(worker)


def test_a_connection_that_cannot_be_watched_is_made_again(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    # What other tests have left to the collector is closed now, and not meanwhile.
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        lender = without_watches(lambda: host.connect(0), host.keyd.epoll)
        assert lender.end.recv(1) == b""
        assert host.lost() == LOST + b"\0\0"
    assert capsys.readouterr().err == (
        "keyd: unix:/a: its connection cannot be watched: No space left on device\n"
    )
    assert len(os.listdir("/proc/self/fd")) == descriptors + 2, "the other host's ends"
    lender = host.connect(0)
    lender.lend()
    host.turn()
    worker = host.request()
    lender.sign(*lender.asked())
    host.signed(worker)


def test_what_connects_is_told_of_a_lost_connection_once_there_is_room(host: Host) -> None:
    """It connects to no upstream again before it knows that it is lost."""
    lenders = [host.connect(0), host.connect(1)]
    ours = host.broker._connector
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with suppress(BlockingIOError):
        while True:
            ours.send(WANTED + b"\0", socket.MSG_DONTWAIT)
    for lender in lenders:
        lender.end.close()
    host.turn()
    with suppress(BlockingIOError):
        while True:
            assert host.lost() == WANTED + b"\0"
    host.look_at_clock()
    assert [host.lost(), host.lost()] == [LOST + b"\0\0", LOST + b"\1\0"]
    lender = host.connect(0)
    lender.lend()
    host.turn()
    worker = host.request()
    lender.sign(*lender.asked())
    host.signed(worker)
    host.look_at_clock()
    with pytest.raises(BlockingIOError):
        host.lost()


def test_one_whose_room_cannot_be_waited_for_is_ended(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    lender = host.connect(0)
    lender.lend()
    host.turn()
    large = SIGN._replace(messages=flight(certificate=bytes(190_000)))
    large = large._replace(payload=certificate_verify(HELLO, large.messages or b""))
    workers = [host.opened_channel() for _ in range(4)]
    for worker in workers:
        worker.send(large.encode())
    without_watches(host.turn, host.keyd.epoll)
    reason = "keyd cannot wait to send more: No space left on device"
    assert capsys.readouterr().err == f"keyd: a connection to an upstream is ended: {reason}\n"
    host.turn()
    assert {host.lost(), host.lost()} == {WANTED + b"\1", LOST + b"\0\1"}
    (upstream, _) = host.broker._upstreams
    assert (upstream.connection, upstream.why) == (None, reason)
    # They are asked again, once it is there again.
    again = host.connect(0)
    again.lend()
    host.turn()
    for _ in range(100):
        for ask in again.asked():
            signature = KEY.sign(large.payload, ec.ECDSA(hashes.SHA256()))
            again.say(Answer(ask.id, Reply(Status.DONE, signature)).encode())
        host.turn()
    assert [host.answer(worker).status for worker in workers] == [Status.DONE] * 4


def test_but_not_for_long(host: Host) -> None:
    worker = host.request()
    for upstream in host.broker._upstreams:
        upstream.hoped_for_until = 0.0
    host.look_at_clock()
    assert "unix:/a: has not said yet which keys it has" in host.refused(worker)


def test_the_second_is_asked_for_a_key_that_the_first_has_not(host: Host) -> None:
    first, second = host.connect(0), host.connect(1)
    first.lend(bytes(32))
    second.lend()
    host.turn()
    worker = host.request()
    assert not first.asked()
    second.sign(*second.asked())
    host.signed(worker)
    assert host.look_at_clock() == [f"does not lend key sha256:{ID.hex()}", READY]


@pytest.mark.parametrize("status", [Status.FAILED, Status.EXHAUSTED, Status.NOT_GRANTED])
def test_the_second_is_asked_where_the_first_refuses(
    host: Host, status: Status, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = host.connect(0), host.connect(1)
    first.lend()
    second.lend()
    host.turn()
    worker, other = host.request(), host.request()
    for ask in first.asked():
        first.refuse(ask, status)
    host.turn()
    for ask in second.asked():
        second.sign(ask)
    host.signed(worker)
    host.signed(other)
    # Once, and not for each.
    assert capsys.readouterr().err == f"keyd: unix:/a refused: {status.name} (its log says what)\n"


def test_where_both_refuse_both_are_named(host: Host) -> None:
    first, second = host.connect(0), host.connect(1)
    first.lend()
    second.lend()
    host.turn()
    worker = host.request()
    first.refuse(*first.asked(), Status.NOT_GRANTED)
    host.turn()
    second.refuse(*second.asked(), Status.EXHAUSTED)
    assert host.refused(worker) == "sign: unix:/a: NOT_GRANTED; unix:/b: EXHAUSTED"


def test_the_second_is_asked_where_the_first_closes(host: Host) -> None:
    first, second = host.connect(0), host.connect(1)
    first.lend()
    second.lend()
    host.turn()
    worker = host.request()
    assert first.asked()
    first.end.close()
    host.turn()
    second.sign(*second.asked())
    host.signed(worker)
    # It had served, so that it is connected to again at once.
    assert host.lost() == LOST + b"\0\1"


class Scarce(socket.socket):
    """One that cannot receive, for once: no test has the kernel run out of memory."""

    error = 0

    def recv(self, *arguments: int) -> bytes:
        error, self.error = self.error, 0
        if error:
            raise OSError(error, os.strerror(error))
        return super().recv(*arguments)

    def send(self, *arguments: Any) -> int:
        error, self.error = self.error, 0
        if error:
            raise OSError(error, os.strerror(error))
        return super().send(*arguments)


def test_an_ask_that_there_was_no_memory_to_send_is_asked_on_another_connection(
    host: Host,
) -> None:
    lender = host.connect(0)
    lender.lend()
    host.turn()
    connection = host.broker._upstreams[0].connection
    assert connection is not None
    connection._writer = scarce = Scarce(fileno=connection._writer.detach())
    scarce.error = errno.ENOBUFS
    worker = host.request()
    assert lender.end.recv(1000, socket.MSG_DONTWAIT) == HEARD
    assert lender.end.recv(1000, socket.MSG_DONTWAIT) == b""
    assert host.lost() == LOST + b"\0\1"
    again = host.connect(0)
    again.lend()
    host.turn()
    again.sign(*again.asked())
    host.signed(worker)


def test_a_machine_that_is_short_of_memory_ends_no_connection(host: Host) -> None:
    first = host.connect(0)
    first.lend()
    host.turn()
    connection = host.broker._upstreams[0].connection
    assert connection is not None
    connection.reader = scarce = Scarce(fileno=os.dup(connection.reader.fileno()))
    host.opened.append(scarce)
    worker = host.request()
    scarce.error = errno.ENOMEM
    first.sign(*first.asked())
    host.signed(worker)
    assert not scarce.error
    assert not connection.ended_for


def test_one_that_closes_in_the_middle_of_an_answer_has_not_answered(host: Host) -> None:
    first = host.connect(0)
    first.lend()
    host.turn()
    worker = host.request()
    (ask,) = first.asked()
    first.say(Answer(ask.id, Reply(Status.DONE, b"half")).encode()[:-2])
    first.end.close()
    host.turn()
    again = host.connect(0)
    again.lend()
    host.turn()
    again.sign(*again.asked())
    host.signed(worker)


def test_an_ask_that_ends_connections_is_given_up(host: Host) -> None:
    worker = host.request()
    for _ in range(3):
        lender = host.connect(0)
        lender.lend()
        host.turn()
        assert lender.asked()
        lender.end.close()
        host.turn()
    lender = host.connect(0)
    lender.lend()
    host.turn()
    assert not lender.asked()
    host.broker._upstreams[1].hoped_for_until = 0.0
    host.look_at_clock()
    closed = "unix:/a: the connection was closed at its other end"
    assert host.refused(worker).startswith(f"sign: {closed}; {closed}; ")


def test_a_slow_first_loses_to_the_second(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = host.connect(0), host.connect(1)
    first.lend()
    second.lend()
    host.turn()
    worker = host.request()
    (late,) = first.asked()
    monkeypatch.setattr(broker_module, "_SLOW_SECONDS", 0.0)
    host.look_at_clock()
    second.sign(*second.asked())
    host.signed(worker)
    # The next one asks the quick one first, until the slow one has answered.
    host.request()
    assert not first.asked()
    assert second.asked()
    first.sign(late)
    host.turn()
    host.request()
    assert first.asked()


def test_an_answer_that_comes_too_late_is_for_nobody(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    lender = host.connect(0)
    lender.lend()
    host.turn()
    monkeypatch.setattr(broker_module, "_MOST_SECONDS", 0.0)
    worker = host.request()
    (ask,) = lender.asked()
    host.look_at_clock()
    assert host.refused(worker) == "sign: unix:/a: no answer in time"
    lender.sign(ask)
    assert host.look_at_clock()[0] == READY
    monkeypatch.setattr(broker_module, "_OVERDUE_SECONDS", 0.0)
    host.request()
    host.look_at_clock()
    host.look_at_clock()
    assert host.lost() == LOST + b"\0\1", "one that never answers is connected to anew"


MALFORMED = {
    "a message of endless length": struct.pack("!I", 0xFFFF_FFFF) + b"R",
    "a message of no length": struct.pack("!I", 0),
    "a message of no kind": struct.pack("!I", 3) + b"xyz",
    "an answer to nothing": Answer(99, Reply(Status.DONE, b"x")).encode(),
    "a greeting of another version": struct.pack("!I", 2) + b"G\x63",
    "a flood of greetings": Greeting(frozenset({ID})).encode() * 40,
}


@pytest.mark.usefixtures("hopeless")
@pytest.mark.parametrize("octets", MALFORMED.values(), ids=MALFORMED.keys())
def test_nonsense_ends_that_connection_alone(octets: bytes) -> None:
    host = Host()
    first, second = host.connect(0), host.connect(1)
    first.lend()
    second.lend()
    host.turn()
    worker = host.request()
    first.say(octets)
    host.turn()
    assert first.end.recv(10_000), "what it was asked"
    assert host.lost()[:2] == LOST + b"\0"
    second.sign(*second.asked())
    host.signed(worker)
    first_state, second_state = host.look_at_clock()
    assert first_state.startswith("it ")
    assert second_state == READY


def test_an_answer_twice_is_one_to_nothing(host: Host) -> None:
    lender = host.connect(0)
    lender.lend()
    host.turn()
    worker = host.request()
    (ask,) = lender.asked()
    lender.sign(ask)
    lender.sign(ask)
    host.signed(worker)
    assert host.lost() == LOST + b"\0\1"


def test_one_that_reads_nothing_is_bounded_and_the_other_is_asked(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "_MOST_UNSENT_OCTETS", 200_000)
    first, second = host.connect(0), host.connect(1)
    first.lend()
    second.lend()
    host.turn()
    large = SIGN._replace(messages=flight(certificate=bytes(150_000)))
    large = large._replace(payload=certificate_verify(HELLO, large.messages or b""))
    workers = [host.request(large.encode()) for _ in range(4)]
    assert second.asked()
    # What was begun to be sent goes on as it is read.
    asks: list[Ask] = []
    for _ in range(100):
        asks += first.asked()
        host.turn()
    assert asks
    assert all(ask.request == large for ask in asks)
    assert len(asks) < len(workers)
    first.sign(asks[0])
    KEY.public_key().verify(
        host.answer(workers[0]).payload, large.payload, ec.ECDSA(hashes.SHA256())
    )


def test_one_that_ends_while_it_is_written_to(host: Host) -> None:
    lender = host.connect(0)
    lender.lend()
    host.turn()
    large = SIGN._replace(messages=flight(certificate=bytes(190_000)))
    large = large._replace(payload=certificate_verify(HELLO, large.messages or b""))
    for _ in range(4):
        host.request(large.encode())
    writers = [source for source in host.keyd._sources.values() if source.events & 4]
    assert writers, "something waits to be sent"
    lender.end.close()
    host.turn()
    assert host.lost() == LOST + b"\0\1"
    assert not [source for source in host.keyd._sources.values() if source.events & 4]
    # They are asked again, and what comes then is asked after them.
    again = host.connect(0)
    again.lend()
    host.turn()
    worker = host.request()
    asks: list[Ask] = []
    for _ in range(100):
        asks += again.asked()
        host.turn()
    assert [ask.request == SIGN for ask in asks] == [False] * 4 + [True]
    again.sign(asks[-1])
    host.signed(worker)


def test_one_that_says_nothing_is_given_up(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.connect(0)
    monkeypatch.setattr(connection_module, "_GREETING_SECONDS", 0.0)
    host.look_at_clock()
    assert host.lost() == LOST + b"\0\0", "it was of no use"


def test_each_greeting_is_answered(host: Host) -> None:
    lender = host.connect(0)
    for count in (1, 2, 3):
        lender.lend()
        host.turn()
        assert (lender.asked(), lender.heard) == ([], count)


@pytest.mark.usefixtures("hopeless")
def test_one_that_has_something_to_answer_and_says_nothing_is_given_up(host: Host) -> None:
    """As where the network drops all packets. It is connected to anew."""
    first, second = host.connect(0), host.connect(1)
    first.lend()
    second.lend()
    host.turn()

    # It has nothing to say.
    assert host.seconds_pass(4.0) == [READY, READY]
    worker = host.request()
    assert host.look_at_clock() == [READY, READY]
    # It is slow, and there.
    first.lend()
    host.turn()
    assert host.look_at_clock() == [READY, READY]
    silent, other = host.seconds_pass(4.0)
    assert (silent, other) == ("it leaves asks unanswered, and has said nothing for 4 s", READY)
    assert host.lost() == LOST + b"\0\1"
    second.sign(*second.asked())
    host.signed(worker)


@pytest.mark.parametrize("seconds", [4.0, 60.0])
def test_one_that_was_not_heard_by_a_keyd_that_was_stopped_is_not_given_up(
    host: Host, seconds: float
) -> None:
    """What it has answered is there. It is read after the clock was looked at."""
    first, second = host.connect(0), host.connect(1)
    for lender in (first, second):
        lender.lend()
    host.turn()
    worker = host.request()
    (ask,) = first.asked()
    first.sign(ask)
    assert host.seconds_pass(seconds, stopped=True) == [READY, READY]
    # Too late for whoever has asked, after a minute.
    assert host.answer(worker).status is (Status.DONE if seconds < 6.0 else Status.FAILED)
    assert not any(upstream.asks for upstream in host.broker._upstreams)


@pytest.mark.usefixtures("hopeless")
def test_the_reason_stays_while_it_is_tried_again(host: Host) -> None:
    """A tunnel takes each connection, and ends it once the other host was not reached."""
    host.connect(0).end.close()
    host.turn()
    closed, _ = host.look_at_clock()
    assert closed == "the connection was closed at its other end"
    lender = host.connect(0)
    assert host.look_at_clock()[0] == closed
    lender.lend()
    host.turn()
    assert host.look_at_clock()[0] == READY


@pytest.mark.parametrize("message", [b"C", b"F", b"C\2", b"F\377why", b"X\0", b"\0\0"])
def test_what_connects_to_upstreams_is_not_trusted(
    host: Host, capsys: pytest.CaptureFixture[str], message: bytes
) -> None:
    """It is heard no more, and keyd goes on."""
    host.connector.send(message)
    host.turn()
    assert "the process for that talks nonsense" in capsys.readouterr().err
    assert host.broker.news() is not None


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("message", [CONNECTED, FAILED])
def test_what_connects_says_nothing_of_what_is_connected(
    host: Host, capsys: pytest.CaptureFixture[str], message: bytes, number: int
) -> None:
    """A second connection would take the first one's place, whose asks would be nobody's."""
    lender = host.connect(number)
    lender.lend()
    host.turn()
    worker = host.request()
    ours, theirs = socket.socketpair()
    host.opened.append(theirs)
    with ours:
        sent = [ours.fileno()] * 2 if message == CONNECTED else []
        send_descriptors(host.connector, message + bytes((number,)), sent)
    host.turn()
    assert "the process for that talks nonsense" in capsys.readouterr().err
    assert message == FAILED or theirs.recv(1) == b"", "keyd has closed it"
    # The first one goes on, and ends as it would have.
    lender.sign(*lender.asked())
    host.signed(worker)
    lender.end.close()
    host.turn()
    assert host.broker._upstreams[number].connection is None


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("message", [b"F\0why", b"X\0", b"C\2", b"C\0more"])
def test_no_descriptor_stays_open_that_was_not_to_come(
    host: Host, capsys: pytest.CaptureFixture[str], message: bytes, count: int
) -> None:
    ours, theirs = socket.socketpair()
    host.opened.append(theirs)
    with ours:
        send_descriptors(host.connector, message, [ours.fileno()] * count)
    host.turn()
    assert "the process for that talks nonsense" in capsys.readouterr().err
    assert theirs.recv(1) == b""


@pytest.mark.parametrize("kind", ["file", "pipe", "packets", "TCP"])
def test_what_is_no_connection_is_not_taken_for_one(
    host: Host, capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    """A file, for one, cannot be waited for: keyd would end."""
    with ExitStack() as opened:
        one: Any
        if kind == "file":
            one = opened.enter_context((tmp_path / "file").open("wb"))
        elif kind == "pipe":
            one, other = (os.fdopen(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True))
            opened.enter_context(one)
            opened.enter_context(other)
        else:
            family = socket.AF_INET if kind == "TCP" else socket.AF_UNIX
            type_ = socket.SOCK_STREAM if kind == "TCP" else socket.SOCK_SEQPACKET
            one = opened.enter_context(socket.socket(family, type_))
        before = set(os.listdir("/proc/self/fd"))
        send_descriptors(host.connector, CONNECTED + b"\0", [one.fileno()] * 2)
        host.turn()
        assert set(os.listdir("/proc/self/fd")) <= before
    assert "the process for that talks nonsense" in capsys.readouterr().err
    assert host.broker._upstreams[0].connection is None


def test_one_descriptor_is_none(host: Host) -> None:
    """keyd has reached its limit, or the process has sent one only."""
    ours, theirs = socket.socketpair()
    host.opened.append(theirs)
    with ours:
        send_descriptors(host.connector, CONNECTED + b"\0", [ours.fileno()])
    host.turn()
    assert theirs.recv(1) == b""
    assert host.lost() == LOST + b"\0\0"


def test_the_end_of_what_connects_is_said(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    lender = host.connect(0)
    lender.lend()
    host.turn()
    host.connector.close()
    host.turn()
    assert "the process for that has ended" in capsys.readouterr().err
    # What is connected stays so.
    worker = host.request()
    lender.sign(*lender.asked())
    host.signed(worker)
    lender.end.close()
    host.turn()
    assert host.broker._upstreams[0].why == ORPHANED


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=8))
def test_whatever_an_upstream_says_keyd_goes_on(pieces: list[bytes]) -> None:
    host = Host()
    lender = host.connect(0)
    for piece in pieces:
        try:
            lender.say(piece)
        except OSError:
            break
        host.turn()
    lender.end.close()
    host.turn()
    again = host.connect(1)
    again.lend()
    host.turn()
    worker = host.request()
    again.sign(*again.asked())
    host.signed(worker)
    for one in host.opened:
        one.close()
    host.turn()


def test_what_was_answered_before_nonsense_is_answered(host: Host) -> None:
    lender = host.connect(0)
    lender.lend()
    host.turn()
    worker = host.request()
    (ask,) = lender.asked()
    signature = KEY.sign(ask.request.payload, ec.ECDSA(hashes.SHA256()))
    answer = Answer(ask.id, Reply(Status.DONE, signature)).encode()
    lender.say(answer + b"\0\0\0\1x")
    host.signed(worker)
    assert host.lost() == LOST + b"\0\1"


@pytest.mark.parametrize("bound", ["_MOST_KEPT", "_MOST_KEPT_OCTETS"])
def test_no_more_is_kept_than_there_is_room_for(
    host: Host, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(broker_module, bound, 0)
    unheard = "sign: unix:/a: has not said yet which keys it has"
    assert host.refused(host.request()).startswith(unheard)


def test_there_is_room_again_for_what_is_kept(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "_MOST_KEPT_OCTETS", len(HELLO) + len(FLIGHT))
    first = host.request()
    assert "has not said yet" in host.refused(host.request())
    lender = host.connect(0)
    lender.lend()
    host.turn()
    lender.sign(*lender.asked())
    host.signed(first)
    lender.end.close()
    host.turn()
    second = host.request()
    again = host.connect(0)
    again.lend()
    host.turn()
    again.sign(*again.asked())
    host.signed(second)


def test_of_a_flood_of_greetings_few_are_taken(host: Host) -> None:
    """Each one has all asks that are kept looked at, with the broker's lock held."""
    lender, connection = host.connect(0), host.broker._upstreams[0].connection
    assert connection is not None
    lender.say(Greeting(frozenset()).encode() * 5000)
    assert len(connection.hear()) < 100
    assert connection.ended_for == "it says too much unasked"
