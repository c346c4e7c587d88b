"""keyd and its parents: what was said before an end is heard, and what is refused is recorded."""

import errno
import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from integration.hellos import certificate_verify, client_hello, flight

from keyd.daemon import Keyd
from keyd.linux.descriptors import send_descriptors
from keyd.mldsa import KEY_TYPES, PUBLIC_OCTETS
from keyd.powers import ALL_POWERS, PrivateKey
from keyd.protocol import (
    ANY_NAME,
    Done,
    Grant,
    GrantSet,
    Open,
    Operation,
    Parting,
    Power,
    Refusal,
    Reply,
    Request,
    SignatureScheme,
    Status,
    decode_report,
)
from keyd.pss import Binding, PSSPrivateKey


def grants(*keys: bytes, powers: frozenset[Power] = frozenset({Power.SIGN_TLS13})) -> GrantSet:
    """Of set 0, for clients of any name."""
    return GrantSet(0, tuple(Grant(0, ANY_NAME, key, powers) for key in keys))


def connected(keyd: Keyd) -> tuple[socket.socket, Callable[[], None], list[None]]:
    """A parent's socket, what keyd does when it can be read, and whether the parent is gone."""
    parent, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gone: list[None] = []
    keyd.hear_parent(ours, lambda: gone.append(None))
    source = keyd._sources[ours.fileno()]

    def hear() -> None:
        source.hear()

    return parent, hear, gone


def open_channel(parent: socket.socket) -> socket.socket:
    worker, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with keyds:
        (announcement,) = grants(bytes(32)).encode()
        parent.send(announcement)
        terms = Open(connection=7, lifetime_ms=60_000, operations=1, grants=0)
        send_descriptors(parent, terms.encode(), [keyds.fileno()])
    return worker


def refuse_all(keyd: Keyd) -> None:
    for descriptor, channel in list(keyd._channels.items()):
        keyd._answer(descriptor, channel)


def test_a_channel_is_opened_of_a_parent_that_ended_with_refusals_unread() -> None:
    keyd = Keyd({})
    parent, hear, gone = connected(keyd)
    with open_channel(parent) as worker:
        hear()
        hear()
        worker.send(b"nonsense")
        refuse_all(keyd)
    with open_channel(parent):
        parent.close()
        while not keyd._channels:
            hear()
        assert not gone
        while not gone:
            hear()


def test_what_is_refused_while_keyd_leaves_is_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    """Its parents cannot be told any more."""
    keyd = Keyd({})
    parent, hear, _ = connected(keyd)
    left: list[float] = []
    with parent, open_channel(parent) as worker:
        hear()
        hear()
        keyd.leave(60, lambda: left.append(time.monotonic()))
        assert decode_report(parent.recv(100)) == Parting()
        assert parent.recv(100) == b""
        worker.send(b"nonsense")
        refuse_all(keyd)
        assert worker.recv(100)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"keyd: refused, connection 7, {Status.MALFORMED.name}: ")
    assert not left


def test_a_refusal_goes_to_the_parent(capsys: pytest.CaptureFixture[str]) -> None:
    keyd = Keyd({})
    parent, hear, _ = connected(keyd)
    with parent, open_channel(parent) as worker:
        hear()
        hear()
        worker.send(b"nonsense")
        refuse_all(keyd)
        assert Refusal.decode(parent.recv(1000)).status is Status.MALFORMED
    assert not capsys.readouterr().err


@pytest.mark.parametrize("kind", ["a file", "a pipe", "a stream that ends", "events"])
def test_what_is_no_channel_ends_no_keyd(kind: str, tmp_path: Path) -> None:
    keyd = Keyd({})
    parent, hear, gone = connected(keyd)
    with parent, ExitStack() as stack:
        if kind == "a file":
            sent = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        elif kind == "a pipe":
            sent, other = os.pipe()
            os.write(other, b"octets")
            stack.callback(os.close, other)
        elif kind == "events":
            sent = os.eventfd(1)
        else:
            ours, theirs = socket.socketpair()
            sent = ours.detach()
            theirs.close()
        stack.callback(os.close, sent)
        (announcement,) = grants(bytes(32)).encode()
        parent.send(announcement)
        terms = Open(connection=7, lifetime_ms=60_000, operations=1, grants=0)
        send_descriptors(parent, terms.encode(), [sent])
        hear()
        hear()
        for _ in range(3):
            keyd._take_turn(0)
        assert not keyd._channels
        if kind != "a stream that ends":
            # Its worker is not to wait for another channel.
            refused = Refusal(7, Status.FAILED, "no channel: Socket operation on non-socket")
            assert decode_report(parent.recv(1000, socket.MSG_DONTWAIT)) == refused
            assert keyd.tally.totals()["refused"] == {"failed": 1}
        with open_channel(parent) as worker:
            hear()
            hear()
            worker.send(b"nonsense")
            refuse_all(keyd)
            assert worker.recv(100)
    assert not gone


def test_a_channel_that_cannot_be_watched_ends_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the user of keyd has all watches that epoll(7) gives one (max_user_watches)."""

    class Full:
        def register(self, *_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    keyd = Keyd({})
    parent, hear, gone = connected(keyd)
    with parent:
        hears_again = keyd.epoll
        monkeypatch.setattr(keyd, "epoll", Full())
        with open_channel(parent) as worker:
            hear()
            hear()
            assert Reply.decode(worker.recv(100)) == Reply(Status.FAILED)
            assert worker.recv(1) == b""
        reason = f"no channel: {os.strerror(errno.ENOSPC)}"
        told = parent.recv(1000, socket.MSG_DONTWAIT)
        assert decode_report(told) == Refusal(7, Status.FAILED, reason)
        monkeypatch.setattr(keyd, "epoll", hears_again)
        with open_channel(parent):
            hear()
            hear()
            assert keyd._channels
    assert not gone
    assert "no channel for connection 7: No space left on device" in capsys.readouterr().err


def make_key(kind: str) -> PrivateKey:
    if kind.startswith("ML-DSA"):
        if not KEY_TYPES:
            pytest.skip("this version of cryptography does not know ML-DSA")
        return KEY_TYPES[kind][0].generate()  # type: ignore[attr-defined,no-any-return]
    if kind == "Ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    if kind.startswith("RSA"):
        key = rsa.generate_private_key(65537, 2048)
        return PSSPrivateKey(key, Binding(b"", None)) if kind.endswith("PSS") else key
    curve = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}[kind]
    return ec.generate_private_key(curve)


@pytest.mark.parametrize(
    ("kind", "slow"),
    [
        *(("RSA", True), ("RSA for PSS", True), ("P-384", True), ("P-521", True)),
        *((kind, True) for kind in PUBLIC_OCTETS),
        *(("P-256", False), ("Ed25519", False)),
    ],
)
def test_another_thread_takes_over_while_a_slow_key_signs(kind: str, slow: bool) -> None:
    keyd = Keyd({bytes(32): make_key(kind)})
    parent, hear, _ = connected(keyd)
    assert keyd.lead.take(0)
    with parent, open_channel(parent) as worker, open_channel(parent) as other:
        for _ in range(4):
            hear()
        for one in (worker, other):
            one.send(Request(Operation.SIGN, 0, bytes(32), b"octets").encode())
        # Nobody was known to wait; but the other one did.
        keyd._take_turn(0)
        assert keyd.lead.held
        keyd._take_turn(0)
        assert worker.recv(100)
        assert other.recv(100)
        # For one more event, it waits in any case.
        assert keyd.lead.held
        keyd.lead.next_event(0)
    assert keyd.lead.held is not slow


class Scarce(socket.socket):
    """One that cannot send: no test has the kernel run out of memory."""

    def send(self, *_: object) -> int:
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))


def have_no_memory_for_answers(keyd: Keyd) -> None:
    ((descriptor, channel),) = keyd._channels.items()
    channel.socket.detach()
    channel.socket = Scarce(fileno=descriptor)


@pytest.mark.parametrize("asks_again", [False, True])
def test_where_no_answer_can_be_sent_the_worker_sees_that_and_the_others_go_on(
    asks_again: bool,
) -> None:
    keyd = Keyd({})
    parent, hear, _ = connected(keyd)
    with parent, open_channel(parent) as worker:
        hear()
        hear()
        have_no_memory_for_answers(keyd)
        worker.send(b"nonsense")
        keyd._take_turn(0)
        # An end of file, and keyd is there still: what the provider looks for.
        assert worker.recv(100) == b""
        assert [events & select.POLLHUP for _, events in polled(worker)] == [0]
        keyd._take_turn(0)
        assert keyd._channels
        if asks_again:
            worker.send(b"nonsense")
        else:
            worker.shutdown(socket.SHUT_RDWR)
        keyd._take_turn(0)
        assert not keyd._channels
        assert keyd.tally.totals()["refused"] == {"malformed": 1}


def polled(one: socket.socket) -> list[tuple[int, int]]:
    poll = select.poll()
    poll.register(one, select.POLLIN)
    return poll.poll(0)


def test_a_signature_that_cannot_be_sent_was_made_and_is_refused() -> None:
    keyd = Keyd({ONE: ed25519.Ed25519PrivateKey.generate()})
    parent, hear, _ = connected(keyd)
    with parent:
        announce(parent, hear, grants(ONE))
        messages = flight()
        verify = certificate_verify(HELLO, messages)
        with opened_with(parent, 0, hear) as worker:
            have_no_memory_for_answers(keyd)
            request = Request(Operation.SIGN, SignatureScheme.ed25519, ONE, verify, messages)
            worker.send(request.encode())
            keyd._take_turn(0)
            totals = keyd.tally.totals()
            assert (totals["signed"], totals["refused"]) == (1, {"failed": 1})
            assert totals["seconds"][-1] == 1


# --- empty packets, which recv(2) does not tell from the end ---------------------------------


def test_a_worker_that_sends_an_empty_packet_is_refused_and_named() -> None:
    keyd = Keyd({})
    parent, hear, _ = connected(keyd)
    with parent, open_channel(parent) as worker:
        hear()
        hear()
        worker.send(b"")
        refuse_all(keyd)
        refusal = Refusal.decode(parent.recv(1000))
        assert (refusal.connection, refusal.status) == (7, Status.MALFORMED)
    assert not keyd._channels


def test_a_worker_that_ends_is_not_refused() -> None:
    keyd = Keyd({})
    parent, hear, _ = connected(keyd)
    with parent:
        with open_channel(parent):
            hear()
            hear()
        refuse_all(keyd)
        assert not keyd._channels
        parent.setblocking(False)
        with pytest.raises(BlockingIOError):
            parent.recv(1000)


def test_a_parent_that_sends_an_empty_packet_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    keyd = Keyd({})
    parent, hear, gone = connected(keyd)
    with parent:
        parent.send(b"")
        hear()
        assert gone
        # Channels that it has opened are still served.
        assert decode_report(parent.recv(100)) == Parting()
        assert parent.recv(100) == b""
    assert "closing the connection to a parent: " in capsys.readouterr().err


# --- what a parent grants ----------------------------------------------------------------

ONE, OTHER = bytes(32), bytes([1]) * 32
SIGN, BOTH = frozenset({Power.SIGN_TLS13}), ALL_POWERS
HELLO = client_hello()
TO_SIGN = certificate_verify(HELLO, flight())


def opened_with(
    parent: socket.socket,
    number: int,
    hear: Callable[[], None],
    hello: bytes = HELLO,
) -> socket.socket:
    worker, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with keyds:
        terms = Open(7, 60_000, operations=9, grants=number, client_hello=hello)
        send_descriptors(parent, terms.encode(), [keyds.fileno()])
    hear()
    return worker


def announce(parent: socket.socket, hear: Callable[[], None], said: GrantSet) -> None:
    for message in said.encode():
        parent.send(message)
        hear()


def answered(keyd: Keyd, worker: socket.socket, operation: Operation, key: bytes) -> Status:
    worker.send(Request(operation, 0x0804, key, b"x").encode())
    refuse_all(keyd)
    return Reply.decode(worker.recv(100)).status


@pytest.mark.parametrize(
    ("number", "operation", "key", "status"),
    [
        (0, Operation.SIGN, ONE, Status.UNKNOWN_KEY),
        (0, Operation.SIGN, OTHER, Status.NOT_GRANTED),
        (0, Operation.DECRYPT, ONE, Status.NOT_GRANTED),
        (7, Operation.SIGN, OTHER, Status.UNKNOWN_KEY),
        (7, Operation.DECRYPT, OTHER, Status.UNKNOWN_KEY),
        (7, Operation.SIGN, ONE, Status.NOT_GRANTED),
    ],
)
def test_a_channel_may_do_what_its_set_says(
    number: int, operation: Operation, key: bytes, status: Status
) -> None:
    keyd = Keyd({})
    parent, hear, _ = connected(keyd)
    with parent:
        announce(parent, hear, grants(ONE))
        announce(parent, hear, grants(OTHER, powers=BOTH)._replace(number=7))
        with opened_with(parent, number, hear) as worker:
            assert answered(keyd, worker, operation, key) is status


def test_a_descriptor_that_comes_with_grants_is_closed() -> None:
    """A parent of ours sends none; keyd must not run out of them for one that does."""
    keyd = Keyd({})
    parent, hear, _ = connected(keyd)
    ours, theirs = socket.socketpair()
    with parent, ours:
        (announcement,) = grants(bytes(32)).encode()
        with theirs:
            send_descriptors(parent, announcement, [theirs.fileno()])
        hear()
        ours.setblocking(False)
        assert ours.recv(1) == b""


def test_a_set_may_be_empty() -> None:
    """Of a virtual host whose directory has no certificate with a name in it."""
    keyd = Keyd({})
    parent, hear, gone = connected(keyd)
    with parent:
        announce(parent, hear, GrantSet(0, ()))
        with opened_with(parent, 0, hear) as worker:
            assert not gone
            assert answered(keyd, worker, Operation.SIGN, ONE) is Status.NOT_GRANTED


def test_a_set_of_thousands_comes_in_several_messages() -> None:
    keyd = Keyd({})
    parent, hear, _ = connected(keyd)
    keys = [number.to_bytes(32, "big") for number in range(5000)]
    with parent:
        announce(parent, hear, grants(*keys))
        for key in (keys[0], keys[2500], keys[-1]):
            with opened_with(parent, 0, hear) as worker:
                assert answered(keyd, worker, Operation.SIGN, key) is Status.UNKNOWN_KEY
        with opened_with(parent, 0, hear) as worker:
            assert answered(keyd, worker, Operation.SIGN, b"?" * 32) is Status.NOT_GRANTED


def test_keyd_hangs_up_on_a_parent_that_names_no_set(capsys: pytest.CaptureFixture[str]) -> None:
    """Also on one that names a set of another parent's."""
    keyd = Keyd({})
    other, hear_other, _ = connected(keyd)
    parent, hear, gone = connected(keyd)
    with other, parent:
        announce(other, hear_other, grants(ONE))
        with opened_with(parent, 0, hear) as worker:
            assert gone
            assert worker.recv(100) == b""
    assert "an open with set 0, which was not announced" in capsys.readouterr().err


def test_a_set_stays_as_it_is_once_it_is_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    keyd = Keyd({})
    parent, hear, gone = connected(keyd)
    with parent:
        announce(parent, hear, grants(ONE))
        with opened_with(parent, 0, hear) as worker:
            announce(parent, hear, grants(ONE))
            assert not gone
            announce(parent, hear, grants(OTHER))
            assert gone
            assert answered(keyd, worker, Operation.SIGN, OTHER) is Status.NOT_GRANTED
    assert "more grants for set 0, which is in use" in capsys.readouterr().err


# --- whose client it is ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server_name", "own"),
    [("one.test", ONE), ("a.other.test", OTHER), (None, OTHER), ("other.test", None)],
)
def test_the_keys_are_those_that_the_clients_name_selects(
    server_name: str | None, own: bytes | None
) -> None:
    keyd = Keyd({})
    parent, hear, _ = connected(keyd)
    sites = (
        Grant(0, "one.test", ONE, SIGN),
        Grant(1, "*.other.test", OTHER, SIGN),
        Grant(1, "", OTHER, SIGN),
    )
    with parent:
        announce(parent, hear, GrantSet(0, sites))
        for key in (ONE, OTHER):
            with opened_with(parent, 0, hear, client_hello(server_name)) as worker:
                status = Status.UNKNOWN_KEY if key == own else Status.NOT_GRANTED
                assert answered(keyd, worker, Operation.SIGN, key) is status


@pytest.mark.parametrize(
    ("hello", "status", "detail"),
    [
        (b"", Status.UNWITNESSED, "sign for a client whose ClientHello was not seen"),
        (
            client_hello(more=[(1000 + number, b"") for number in range(256)]),
            Status.UNWITNESSED,
            "sign for a ClientHello with more than 256 extensions",
        ),
        (HELLO[:-1], Status.NOT_TLS, "sign for a ClientHello of 75 octets, and of another length"),
        (b"\2" + HELLO[1:], Status.NOT_TLS, "sign for no ClientHello"),
    ],
    ids=["none", "many extensions", "cut short", "another message"],
)
def test_without_a_clients_message_nothing_is_done(
    hello: bytes, status: Status, detail: str
) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    keyd = Keyd({ONE: key})
    parent, hear, _ = connected(keyd)
    with parent:
        announce(parent, hear, grants(ONE))
        with opened_with(parent, 0, hear, hello) as worker:
            assert answered(keyd, worker, Operation.SIGN, ONE) is status
        assert decode_report(parent.recv(1000)) == Refusal(7, status, detail)


# --- what was done -------------------------------------------------------------------------


@pytest.mark.parametrize("keeps_up", [True, False])
def test_a_parent_is_told_what_was_done_before_the_worker_is(keeps_up: bool) -> None:
    """One that does not keep up misses it, and nobody waits for it."""
    key = ed25519.Ed25519PrivateKey.generate()
    keyd = Keyd({ONE: key})
    parent, hear, _ = connected(keyd)
    messages = flight()
    verify = certificate_verify(HELLO, messages)
    with parent:
        announce(parent, hear, grants(ONE))
        with opened_with(parent, 0, hear) as worker:
            (control,) = keyd._parents
            control.setblocking(False)
            while not keeps_up:
                try:
                    control.send(bytes(100))
                except BlockingIOError:
                    break
            request = Request(Operation.SIGN, SignatureScheme.ed25519, ONE, verify, messages)
            worker.send(request.encode())
            refuse_all(keyd)
            assert Reply.decode(worker.recv(200)).status is Status.DONE
            if keeps_up:
                assert decode_report(parent.recv(100)) == Done(7, Operation.SIGN)
