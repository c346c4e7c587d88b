"""A keyd that lends its keys: whom it answers, what, and what becomes of everything else.

Its threads are real, and so is the listening socket. The test is the parent, which introduces, and
the other host.
"""

import contextlib
import errno
import gc
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from integration.hellos import TLS12, certificate_verify, client_hello, flight
from integration.watches import without_watches

from keyd import daemon
from keyd.daemon import Keyd
from keyd.powers import ALL_POWERS, KeyElsewhere, Told
from keyd.protocol import (
    Operation,
    Power,
    Reply,
    Request,
    SignatureScheme,
    Status,
    mask_of,
)
from keyd.reference import key_id
from keyd.upstream import stream as stream_module
from keyd.upstream.awake import Awake
from keyd.upstream.lender import Lender
from keyd.upstream.messages import (
    HEARD,
    MAX_FROM_BORROWER_OCTETS,
    MAX_FROM_LENDER_OCTETS,
    MAX_IN_FLIGHT,
    Answer,
    Ask,
    Assembler,
    Greeting,
    decode_from_lender,
)

P256, RSA = ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)
OTHERS = ed25519.Ed25519PrivateKey.generate()
#: A bound for what hangs.
PATIENCE = 30.0
HELLO, FLIGHT = client_hello(), flight()
TLS13_ONLY = frozenset({Power.SIGN_TLS13})


class Slow(KeyElsewhere):
    """A key in a token that answers when the test says so."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.asked: list[tuple[bytes, Told]] = []

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self.key.public_key()

    def ask(self, scheme: SignatureScheme, octets: bytes, told: Told) -> None:
        del scheme
        self.asked.append((octets, told))

    def answer(self) -> None:
        octets, told = self.asked.pop()
        told(self.key.sign(octets, ec.ECDSA(hashes.SHA256())))


IN_TOKEN = Slow()
KEYS = {key_id(key.public_key()): key for key in (P256, RSA, OTHERS, IN_TOKEN)}
ID, RSA_ID, OTHERS_ID, TOKEN_ID = KEYS


def header(name: str | None) -> bytes:
    """Without a name: of a health check."""
    field = b"" if name is None else b"\xe0" + len(name).to_bytes(2, "big") + name.encode()
    body = bytes(12) + field
    command = b"\x20" if name is None else b"\x21"
    return b"\r\n\r\n\0\r\nQUIT\n" + command + b"\x11" + len(body).to_bytes(2, "big") + body


class Host:
    """Another host's keyd, as our parent has introduced it."""

    def __init__(self, path: str, name: str | None) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(path)
        with contextlib.suppress(BrokenPipeError):  # One that is not heard is closed at once.
            self.socket.sendall(header(name))
        self._assembler = Assembler(MAX_FROM_LENDER_OCTETS)

    def hear(self) -> Greeting | Answer | None:
        """The next message; None at the end."""
        while True:
            for message in self._assembler.messages():
                return decode_from_lender(message)
            try:
                octets = self.socket.recv(65536)
            except ConnectionResetError:
                return None
            if not octets:
                return None
            self._assembler.add(octets)

    def answers(self, count: int) -> dict[int, Reply]:
        said = [self.hear() for _ in range(count)]
        return {one.id: one.reply for one in said if isinstance(one, Answer)}

    def ask(self, ask: Ask) -> Reply:
        self.socket.sendall(ask.encode())
        return self.answers(1)[ask.id]


def ask(number: int = 1, key: bytes = ID, **changed: object) -> Ask:
    """For a handshake of TLS 1.3."""
    scheme = (
        SignatureScheme.rsa_pss_rsae_sha256
        if key == RSA_ID
        else SignatureScheme.ecdsa_secp256r1_sha256
    )
    request = Request(
        Operation.SIGN, scheme, key, certificate_verify(HELLO, FLIGHT), messages=FLIGHT
    )
    return Ask(number, 60_000, TLS13_ONLY, HELLO, request)._replace(**changed)  # type: ignore[arg-type]


class Lending:
    """A keyd with threads, or one that the test runs by hand, and the supervisor's orders."""

    def __init__(
        self,
        directory: Path,
        most: int = 1000,
        uid: int | None = None,
        threads: int = 3,
        lends: bool = True,
    ) -> None:
        self.path = str(directory / "lend.sock")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen()
        uid = os.getuid() if uid is None else uid
        mask = mask_of(TLS13_ONLY | {Power.SIGN_TLS12_MARKED})
        grants = {one.hex(): mask for one in (ID, RSA_ID, TOKEN_ID)}
        client = {"grants": grants, "most": most, "seconds": 1000}
        self.keyd = Keyd(KEYS)
        told = {
            "uids": [uid, uid],
            "clients": [client | {"name": "proxy-a"}, client | {"name": "proxy-b"}],
        }
        self.lender = Lender(told, KEYS, self.keyd)
        if lends:
            self.lend()
        self.threads = [threading.Thread(target=self.keyd._work) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def lend(self) -> None:
        self.order("lend", [os.dup(self._listener.fileno())])

    def order(self, name: str, descriptors: list[int]) -> None:
        self.lender.orders[name](descriptors)

    def host(self, name: str = "proxy-a") -> Host:
        host = Host(self.path, name)
        assert host.hear() == Greeting(frozenset({ID, RSA_ID, TOKEN_ID}))
        return host

    def refused(self, count: int = 1) -> list[tuple[object, ...]]:
        """What was refused: name, status, count."""
        found: list[tuple[object, ...]] = []
        deadline = time.monotonic() + PATIENCE
        while len(found) < count and time.monotonic() < deadline:
            found += [
                (one["client_name"], one["status"], one["count"]) for one in self.lender.tick()
            ]
        return found

    def half_a_minute_passes(self, stopped: bool = False) -> None:
        """For all streams. ``stopped``: this process as well."""
        for stream in list(self.keyd.streams.values()):
            stream._heard -= stream_module.SILENCE_SECONDS
        looked = time.monotonic() - (stream_module.SILENCE_SECONDS if stopped else 0.0)
        self.lender._awake = Awake(looked)
        assert list(self.lender.tick()) == []

    def close(self) -> None:
        self.keyd.stop()
        for thread in self.threads:
            thread.join()
        self._listener.close()


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Threads look soon whether they are to stop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keyd.daemon._SWEEP_INTERVAL", 0.05)
        yield


@pytest.fixture
def lending(tmp_path: Path) -> Iterator[Lending]:
    with contextlib.closing(Lending(tmp_path)) as one:
        yield one


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_listener_that_cannot_be_watched_is_told_of_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(Lending(tmp_path, lends=False)) as lending:
        # What other tests have left to the collector is closed now, and not meanwhile.
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        without_watches(lending.lend, lending.keyd.epoll)
        assert "no room for another connection: No space left" in capsys.readouterr().err
        assert len(os.listdir("/proc/self/fd")) == before
        lending.lend()
        assert lending.host().ask(ask()).status is Status.DONE


def test_what_is_lent_is_signed(lending: Lending) -> None:
    reply = lending.host().ask(ask())
    assert reply.status is Status.DONE
    octets = certificate_verify(HELLO, FLIGHT)
    P256.public_key().verify(reply.payload, octets, ec.ECDSA(hashes.SHA256()))
    until(lambda: lending.keyd.tally.totals()["signed"] == 1)
    until(lambda: [one.done for one in lending.lender.news() or ()] == [1, 0])
    assert lending.lender.news() is None


@pytest.mark.parametrize("which", ["both", "the second"])
def test_a_stream_that_cannot_be_watched_ends_alone(tmp_path: Path, which: str) -> None:
    with contextlib.closing(Lending(tmp_path, threads=0)) as lending:
        full = [lending.keyd.epoll, lending.lender.writable]
        for _ in range(2):
            host = Host(lending.path, "proxy-a")
            accept = partial(lending.keyd._take_turn, PATIENCE)
            without_watches(accept, *(full if which == "both" else full[:1]))
            assert host.hear() is None
            assert not lending.keyd.streams
        (told,) = lending.lender.tick()
        assert (told["client_name"], told["status"], told["count"]) == ("", "exhausted", 2)
        assert told["attempted"] == "a stream that cannot be watched: No space left on device"
        assert lending.keyd.tally.totals()["refused"] == {"exhausted": 2}
        host = Host(lending.path, "proxy-a")
        for _ in range(2):
            lending.keyd._take_turn(PATIENCE)
        assert isinstance(host.hear(), Greeting)


def test_many_at_once_in_any_order(lending: Lending) -> None:
    """Those that are slow hold up no others, and each answer has the id of its ask."""
    host = lending.host()
    asks = [ask(number, RSA_ID if number % 10 == 0 else ID) for number in range(MAX_IN_FLIGHT)]
    host.socket.sendall(b"".join(one.encode() for one in asks))
    answers = host.answers(len(asks))
    assert set(answers) == set(range(MAX_IN_FLIGHT))
    assert {reply.status for reply in answers.values()} == {Status.DONE}


@pytest.fixture
def read_ahead(tmp_path: Path) -> Iterator[tuple[Lending, Host]]:
    """Of two asks that came together and take long, one is answered, and the other one is read."""
    with contextlib.closing(Lending(tmp_path, threads=0)) as lending:
        host = Host(lending.path, "proxy-a")
        for _ in range(2):
            lending.keyd._take_turn(PATIENCE)
        assert isinstance(host.hear(), Greeting)
        host.socket.sendall(ask(1, RSA_ID).encode() + ask(2, RSA_ID).encode())
        lending.keyd._take_turn(PATIENCE)
        assert host.answers(1)[1].status is Status.DONE
        yield lending, host


def test_what_was_read_ahead_waits_for_nothing(read_ahead: tuple[Lending, Host]) -> None:
    lending, host = read_ahead
    lending.keyd._take_turn(PATIENCE)
    assert host.answers(1)[2].status is Status.DONE


def test_what_was_read_ahead_is_not_taken_by_one_that_leaves(
    read_ahead: tuple[Lending, Host],
) -> None:
    """As what is still in the kernel's buffer: the other host asks the next keyd."""
    lending, host = read_ahead
    lending.order("lend no more", [])
    lending.keyd._take_turn(PATIENCE)
    assert host.hear() is None
    assert not lending.keyd.streams
    assert lending.keyd.tally.totals()["signed"] == 1


def test_what_a_token_answers_later(lending: Lending) -> None:
    host = lending.host()
    host.socket.sendall(ask(1, TOKEN_ID).encode())
    until(lambda: IN_TOKEN.asked)
    assert host.ask(ask(2)).status is Status.DONE
    IN_TOKEN.answer()
    assert host.answers(1)[1].status is Status.DONE


def test_what_a_token_answers_too_late_is_not_passed_on(lending: Lending) -> None:
    host = lending.host()
    host.socket.sendall(ask(1, TOKEN_ID, deadline_ms=1).encode())
    until(lambda: IN_TOKEN.asked)
    time.sleep(0.01)
    IN_TOKEN.answer()
    assert host.answers(1) == {1: Reply(Status.EXPIRED)}


def test_more_in_flight_than_may_be(lending: Lending) -> None:
    host = lending.host()
    for number in range(MAX_IN_FLIGHT):
        host.socket.sendall(ask(number, TOKEN_ID).encode())
    assert host.ask(ask(MAX_IN_FLIGHT)).status is Status.EXHAUSTED
    while IN_TOKEN.asked:
        IN_TOKEN.answer()
    answers = host.answers(MAX_IN_FLIGHT)
    assert {reply.status for reply in answers.values()} == {Status.DONE}
    assert host.ask(ask()).status is Status.DONE


OTHER_FLIGHT = certificate_verify(client_hello("other"), FLIGHT)
SIGN = ask().request
DECRYPT = Request(Operation.DECRYPT, 0x303, RSA_ID, bytes(256))


@pytest.mark.parametrize(
    ("asked", "status", "why"),
    [
        (ask(key=OTHERS_ID), Status.NOT_GRANTED, "not_lent"),
        (ask(key=bytes(32)), Status.NOT_GRANTED, "not_lent"),
        (ask(powers=frozenset({Power.DECRYPT})), Status.NOT_GRANTED, "not_granted"),
        (ask(powers=frozenset({Power.SIGN_TLS12})), Status.NOT_GRANTED, "not_granted"),
        (ask(powers=ALL_POWERS, request=DECRYPT), Status.NOT_GRANTED, "not_granted"),
        (ask(client_hello=b""), Status.UNWITNESSED, "unwitnessed"),
        (ask(client_hello=b"nonsense"), Status.NOT_TLS, "not_tls"),
        (ask(client_hello=client_hello(versions=(TLS12,))), Status.NOT_TLS, "not_tls"),
        (ask(request=SIGN._replace(payload=OTHER_FLIGHT)), Status.NOT_TLS, "not_tls"),
        (ask(request=SIGN._replace(payload=b"a certificate")), Status.NOT_TLS, "not_tls"),
        (ask(request=SIGN._replace(messages=b"")), Status.UNWITNESSED, "unwitnessed"),
        (ask(deadline_ms=0), Status.EXPIRED, "expired"),
    ],
)
def test_what_is_not_done(lending: Lending, asked: Ask, status: Status, why: str) -> None:
    """It is told of by the client's name, and ends neither the stream nor anything else."""
    host = lending.host()
    assert host.ask(asked) == Reply(status)
    assert lending.refused() == [("proxy-a", why, 1)]
    assert host.ask(ask()).status is Status.DONE
    counts = lending.lender.news()
    assert counts is not None
    assert counts[0].refused == {why: 1}


def test_so_many_and_no_more(tmp_path: Path) -> None:
    """On all streams of one client together; others have their own."""
    with contextlib.closing(Lending(tmp_path, most=3)) as lending:
        first, second, other = lending.host(), lending.host(), lending.host("proxy-b")
        statuses = [one.ask(ask()).status for one in (first, second, first, second, first)]
        assert statuses == [Status.DONE] * 3 + [Status.EXHAUSTED] * 2
        assert other.ask(ask()).status is Status.DONE
        assert lending.refused() == [("proxy-a", "exhausted", 2)]


def test_a_flood_waits_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many are refused in a second, and the rest is not even read; another host is served."""
    monkeypatch.setattr("keyd.upstream.lender._MOST_REFUSED", 20)
    with contextlib.closing(Lending(tmp_path, most=3)) as lending:
        flooding, other = lending.host(), lending.host("proxy-b")
        flooding.socket.sendall(b"".join(ask(number).encode() for number in range(100)))
        statuses = [reply.status for reply in flooding.answers(23).values()]
        assert statuses == [Status.DONE] * 3 + [Status.EXHAUSTED] * 20
        assert other.ask(ask()).status is Status.DONE
        flooding.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            flooding.hear()
        flooding.socket.settimeout(PATIENCE)
        for _ in range(3):
            assert list(lending.lender.tick())
            flooding.answers(20)
        assert list(lending.lender.tick())
        assert len(flooding.answers(17)) == 17
        assert flooding.ask(ask()).status is Status.EXHAUSTED


def test_refusals_that_cannot_be_told_are_told_with_the_next(lending: Lending) -> None:
    """Of as many kinds as can be told in a second. The counts of all are ``news``."""

    def refused(name: str, why: str, detail: str) -> None:
        lending.lender.refused(name, why, Status.NOT_GRANTED, detail)

    def told() -> list[dict[str, Any]]:
        return list(lending.lender.tick())

    for number in range(100):
        refused(f"stranger-{number}", "stranger", f"{number}")
    refused("proxy-a", "not_lent", "first")
    refused("proxy-a", "not_lent", "second")
    for event in told():
        lending.lender.keep(event)
    refused("proxy-a", "not_lent", "third")
    now = told()
    of_a = {"client_name": "proxy-a", "status": "not_lent"}
    assert now[0] == of_a | {"count": 3, "attempted": "third"}
    assert len(now) == 8
    assert told() == []
    lending.lender.keep(now[0])
    assert told() == now[:1]


def test_one_that_rests_leaves_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keyd.upstream.lender._MOST_REFUSED", 1)
    with contextlib.closing(Lending(tmp_path, most=1)) as lending:
        gone, leaving = lending.host(), lending.host("proxy-b")
        for host in (gone, leaving):
            assert host.ask(ask()).status is Status.DONE
            assert host.ask(ask()).status is Status.EXHAUSTED
        gone.socket.close()
        assert len(list(lending.lender.tick())) == 2
        until(lambda: len(lending.keyd.streams) == 1)
        assert leaving.ask(ask()).status is Status.EXHAUSTED
        lending.order("lend no more", [])
        assert leaving.hear() is None
        until(lambda: not lending.keyd.streams)


@pytest.mark.parametrize("name", ["proxy-c", ""])
def test_a_stranger(lending: Lending, name: str) -> None:
    host = Host(lending.path, name)
    assert host.hear() is None
    assert lending.refused() == [(name, "stranger", 1)]
    counts = lending.lender.news()
    assert counts is not None
    assert counts[2:] == [(name, 0, 0, {"stranger": 1})]


def test_so_many_strangers_have_names(lending: Lending) -> None:
    for number in range(40):
        assert Host(lending.path, f"{number}").hear() is None
    until(lambda: sum(one.refused.get("stranger", 0) for one in lending.lender.news() or ()) == 40)


def test_a_process_that_is_not_our_parent(tmp_path: Path) -> None:
    """Whatever the socket's mode lets in."""
    with contextlib.closing(Lending(tmp_path, uid=os.getuid() + 1)) as lending:
        assert Host(lending.path, "proxy-a").hear() is None
        assert lending.refused() == [("", "stranger", 1)]


def test_a_health_check_is_nobodys_alarm(lending: Lending) -> None:
    assert Host(lending.path, None).hear() is None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        one.connect(lending.path)
    assert lending.host().ask(ask()).status is Status.DONE
    assert list(lending.lender.tick()) == []


@pytest.mark.parametrize(
    "octets",
    [
        b"\0\0\0\0",
        (MAX_FROM_BORROWER_OCTETS + 1).to_bytes(4, "big"),
        b"\0\0\0\5nonse",
        Greeting(frozenset()).encode(),
        # One more than there were greetings.
        HEARD * 2,
    ],
)
def test_what_is_malformed_ends_the_stream(lending: Lending, octets: bytes) -> None:
    """What was asked before it is answered."""
    host = lending.host()
    host.socket.sendall(ask().encode() + octets)
    assert host.answers(1)[1].status is Status.DONE
    assert host.hear() is None
    assert lending.refused() == [("proxy-a", "malformed", 1)]


def test_no_header(lending: Lending, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        one.settimeout(PATIENCE)
        one.connect(lending.path)
        one.sendall(b"GET / HTTP/1.1")
        assert one.recv(1) == b""
    assert lending.refused() == [("", "malformed", 1)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        one.settimeout(PATIENCE)
        one.connect(lending.path)
        until(lambda: lending.keyd.streams)
        monkeypatch.setattr(stream_module, "_HEADER_SECONDS", 0.0)
        assert list(lending.lender.tick()) == []
        assert one.recv(1) == b""


def test_a_quiet_stream_is_greeted_again(lending: Lending, monkeypatch: pytest.MonkeyPatch) -> None:
    host = lending.host()
    monkeypatch.setattr(stream_module, "QUIET_SECONDS", 0.0)
    assert list(lending.lender.tick()) == []
    assert isinstance(host.hear(), Greeting)


def test_one_that_has_something_to_answer_shows_that_it_is_there(
    lending: Lending, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before a quiet one."""
    host, idle = lending.host(), lending.host("proxy-b")
    host.socket.sendall(ask(1, TOKEN_ID).encode())
    until(lambda: IN_TOKEN.asked)
    monkeypatch.setattr(stream_module, "BUSY_SECONDS", 0.0)
    assert list(lending.lender.tick()) == []
    assert isinstance(host.hear(), Greeting)
    IN_TOKEN.answer()
    assert host.answers(1)[1].status is Status.DONE
    idle.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        idle.socket.recv(1)


def test_one_that_says_nothing_loses_its_place(
    lending: Lending, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the network drops all packets: the next stream of that host is taken."""
    hosts = [lending.host() for _ in range(8)]
    streams = lending.keyd.streams

    # All have said who they are.
    assert list(lending.lender.tick()) == []
    hosts[0].socket.sendall(HEARD)
    hosts[1].socket.sendall(ask().encode())
    assert hosts[1].answers(1)[1].status is Status.DONE
    until(lambda: sum(stream._spoke for stream in streams.values()) == 2)
    lending.half_a_minute_passes()
    assert [host.hear() for host in hosts[2:]] == [None] * 6
    until(lambda: len(streams) == 2)
    said = "keyd: a stream of proxy-a is ended: it has said nothing for 30 s\n"
    assert capsys.readouterr().err == said * 6
    assert lending.host().ask(ask()).status is Status.DONE
    for host in hosts[:2]:
        assert host.ask(ask(2)).status is Status.DONE


def test_one_that_takes_no_answers_and_says_nothing_loses_its_place(lending: Lending) -> None:
    host = lending.host()
    host.socket.settimeout(0.5)
    asks = b"".join(ask(number).encode() for number in range(900))
    (stream,) = lending.keyd.streams.values()
    # It may take no more for now because its threads wait for a processor.
    while not stream._unsent:
        with contextlib.suppress(TimeoutError):
            asks = asks[host.socket.send(asks) :]
    until(lambda: not stream._in_flight)
    list(lending.lender.tick())
    lending.half_a_minute_passes()
    until(lambda: not lending.keyd.streams)


def test_one_that_was_not_heard_by_a_keyd_that_was_stopped_keeps_its_place(
    tmp_path: Path,
) -> None:
    """What it has said is there. It is read after the clock was looked at."""
    with contextlib.closing(Lending(tmp_path, threads=0)) as lending:
        host = Host(lending.path, "proxy-a")
        for _ in range(2):
            lending.keyd._take_turn(PATIENCE)
        assert isinstance(host.hear(), Greeting)
        assert list(lending.lender.tick()) == []
        host.socket.sendall(ask().encode())
        lending.half_a_minute_passes(stopped=True)
        lending.keyd._take_turn(PATIENCE)
        assert host.answers(1)[1].status is Status.DONE


def test_who_does_not_take_answers_is_not_heard_and_holds_up_nobody(lending: Lending) -> None:
    """What the kernel has no room for is kept, and comes once there is room."""
    host, other = lending.host(), lending.host("proxy-b")
    host.socket.settimeout(0.5)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < 900:
            host.socket.sendall(ask(sent, RSA_ID, deadline_ms=60_000).encode())
            sent += 1
    assert other.ask(ask()).status is Status.DONE
    host.socket.settimeout(PATIENCE)
    answers = host.answers(sent)
    assert set(answers) == set(range(sent))


class Scarce(socket.socket):
    """Its next messages find no memory."""

    errors = 0

    def send(self, *arguments: Any) -> int:
        if self.errors:
            self.errors -= 1
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        return super().send(*arguments)


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "once there is room"])
def test_one_whose_answer_there_is_no_memory_for_ends(lending: Lending, waits: bool) -> None:
    """The other host asks again, on another connection. It would wait for that answer."""
    host = lending.host()
    ((descriptor, stream),) = lending.keyd.streams.items()
    stream._socket = scarce = Scarce(fileno=stream._socket.detach())
    if waits:
        with stream._lock:
            stream._unsent += b"what there was no room for"
        scarce.errors = 1
        stream.flush()
    else:
        scarce.errors = 1
        host.socket.sendall(ask().encode())
    assert host.hear() is None
    until(lambda: descriptor not in lending.keyd.streams)


def test_streams_of_one_client(lending: Lending) -> None:
    hosts = [lending.host() for _ in range(8)]
    assert Host(lending.path, "proxy-a").hear() is None
    assert lending.refused() == [("proxy-a", "exhausted", 1)]
    assert lending.host("proxy-b").ask(ask()).status is Status.DONE
    hosts.pop().socket.close()
    until(lambda: next(iter(lending.lender._borrowers.values())).counts.streams == 7)
    assert lending.host().ask(ask()).status is Status.DONE


def test_another_keyd_lends_from_now_on(lending: Lending) -> None:
    """What was asked is answered; a new connection is for the other one."""
    host, idle = lending.host(), lending.host("proxy-b")
    host.socket.sendall(ask(1, TOKEN_ID).encode())
    until(lambda: IN_TOKEN.asked)
    lending.order("lend no more", [])
    assert idle.hear() is None
    IN_TOKEN.answer()
    assert host.answers(1)[1].status is Status.DONE
    assert host.hear() is None
    Host(lending.path, "proxy-a")
    lending._listener.settimeout(PATIENCE)
    lending._listener.accept()[0].close()


def turn_with_an_order_at_line(lending: Lending, number: int) -> bool:
    """A thread takes its turn; at so many lines of it, another one orders it to lend no more.

    Returns whether there are so many.
    """
    passed = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal passed
        if frame.f_code.co_filename != daemon.__file__:
            return None
        if event == "line":
            passed += 1
            if passed == number:
                another = threading.Thread(target=lending.order, args=("lend no more", []))
                another.start()
                another.join()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        lending.keyd._take_turn(0)
    finally:
        sys.settrace(before)
    return passed >= number


def test_lends_no_more_whatever_another_thread_does_meanwhile(tmp_path: Path) -> None:
    for line in itertools.count(1):
        directory = tmp_path / str(line)
        directory.mkdir()
        with contextlib.closing(Lending(directory, threads=0)) as lending:
            Host(lending.path, "proxy-a")
            if not turn_with_an_order_at_line(lending, line):
                assert line > 10
                return
            for _ in range(3):
                lending.keyd._take_turn(0)
            Host(lending.path, "proxy-b")
            lending.keyd._take_turn(0)
            # It is for the other keyd.
            lending._listener.settimeout(PATIENCE)
            lending._listener.accept()[0].close()


def test_a_second_order_to_lend_changes_nothing(lending: Lending) -> None:
    # What other tests have left to the collector is closed now, and not meanwhile.
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    lending.lend()
    assert len(os.listdir("/proc/self/fd")) == before
    assert lending.host().ask(ask()).status is Status.DONE
