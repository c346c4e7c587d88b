"""Clients of ``keyd listen``: each is answered at once, and again; none holds up the others."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import inf

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

import keyd.clients as clients_module
from keyd.clients import Clients
from keyd.daemon import Keyd
from keyd.linux.unix_socket import Peer
from keyd.powers import ALL_POWERS, Key, KeyElsewhere, Told
from keyd.protocol import Operation, Refusal, Reply, Request, SignatureScheme, Status
from keyd.pss import Binding, PSSPrivateKey
from keyd.reference import key_id

CONTENT = b" " * 64 + b"TLS 1.3, server CertificateVerify\0" + bytes(32)
RSA, EC = rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256R1())
#: id-RSASSA-PSS without parameters (RFC 4055 §3.1).
PSS = PSSPrivateKey(RSA, Binding(bytes.fromhex("300b06092a864886f70d01010a"), None))
SCHEMES = {
    PSS: SignatureScheme.rsa_pss_pss_sha256,
    RSA: SignatureScheme.rsa_pss_rsae_sha256,
    EC: SignatureScheme.ecdsa_secp256r1_sha256,
}


def request(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | PSSPrivateKey) -> bytes:
    return Request(Operation.SIGN, SCHEMES[key], key_id(key.public_key()), CONTENT).encode()


class InToken(KeyElsewhere):
    """The RSA key, of which a signature comes when it is told."""

    def __init__(self) -> None:
        self.asked: list[Told] = []

    def public_key(self) -> rsa.RSAPublicKey:
        return RSA.public_key()

    def ask(self, scheme: SignatureScheme, octets: bytes, told: Told) -> None:
        assert (scheme, octets) == (SCHEMES[RSA], CONTENT)
        self.asked.append(told)


class Listening:
    """A keyd that hears a listener only when it is told to."""

    def __init__(self, stack: ExitStack) -> None:
        self.keys: dict[bytes, Key] = {key_id(EC.public_key()): EC}
        self.keyd = Keyd(self.keys)
        # As on SIGHUP.
        self.keys |= {key_id(key.public_key()): key for key in (RSA, PSS)}
        self.refusals: list[tuple[Status, int]] = []
        self.left: list[None] = []
        self._listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        self._stack = stack
        self._listener.bind("")
        self._listener.listen()
        grants = dict.fromkeys(self.keys, ALL_POWERS)
        self.clients = Clients(self.keyd, self.keys, grants, self._refused)
        self.keyd.hear_listener(self._listener, self._accepted)
        self.hear: Callable[[], Callable[[], None] | None] = self.keyd._sources[
            self._listener.fileno()
        ].hear
        #: Called when a client has been accepted, and not yet been taken in.
        self.accepting: Callable[[], None] = lambda: None

    def _accepted(self, descriptor: int, puts_off: bool) -> Callable[[], None] | None:
        self.accepting()
        return self.clients.accepted(descriptor, puts_off)

    def _refused(self, refusal: Refusal, peer: Peer) -> None:
        self.refusals.append((refusal.status, peer.pid))

    def client(self) -> socket.socket:
        made = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        made.settimeout(10)
        made.connect(self._listener.getsockname())
        return made

    def hear_those_that_were_silent(self) -> None:
        for _ in range(len(self.keyd._sources)):
            self.keyd._take_turn(0)

    def leave(self) -> None:
        self.keyd.leave(60, lambda: self.left.append(None))
        self.clients.leave()

    def turn(self) -> None:
        """What one thread does: for one that has been accepted, if any has said something."""
        self.keyd._take_turn(0)

    @property
    def kept(self) -> int:
        return len(self.clients._kept)

    @property
    def is_idle(self) -> bool:
        """Whether nobody is waited for but for those that may ask again."""
        kept = {client.fileno() for client in self.clients._kept}
        return self.keyd.underway == kept and not self.clients._silent


@pytest.fixture
def listening() -> Iterator[Listening]:
    with ExitStack() as stack:
        yield Listening(stack)


def is_answered(client: socket.socket, status: Status = Status.DONE) -> bool:
    """And nothing comes after a refusal but the end."""
    answered = Reply.decode(client.recv(2000)).status is status
    return answered and (status is Status.DONE or is_left(client))


def is_left(client: socket.socket) -> bool:
    return client.recv(1) == b""


def test_all_that_have_asked_are_answered_at_once(listening: Listening) -> None:
    clients = [listening.client() for _ in range(3)]
    for client in clients:
        client.send(request(EC))
    assert listening.hear() is None
    assert all(is_answered(client) for client in clients)
    assert listening.keyd.tally.totals()["signed"] == 3
    assert listening.is_idle


@pytest.mark.parametrize("key", [RSA, EC])
def test_another_thread_takes_over_while_a_slow_key_signs_again(
    listening: Listening, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
) -> None:
    client = listening.client()
    client.send(request(EC))
    listening.hear()
    assert is_answered(client)
    lead = listening.keyd.lead
    lead._crowded_until = inf
    assert lead.take(0)
    client.send(request(key))
    listening.hear_those_that_were_silent()
    assert is_answered(client)
    assert lead.held is (key is EC)


def test_who_asks_later_is_answered_then(listening: Listening) -> None:
    late, quick = listening.client(), listening.client()
    quick.send(request(EC))
    assert listening.hear() is None
    assert is_answered(quick)
    late.send(request(RSA))
    listening.hear_those_that_were_silent()
    assert is_answered(late)
    assert listening.is_idle


@pytest.mark.parametrize("key", [RSA, PSS], ids=["RSA", "bound to PSS"])
def test_others_are_heard_before_a_slow_key_signs(
    listening: Listening, key: rsa.RSAPrivateKey | PSSPrivateKey
) -> None:
    """Also one that has come since keyd was started."""
    slow, quick = listening.client(), listening.client()
    slow.send(request(key))
    quick.send(request(EC))
    sign = listening.hear()
    assert sign is not None
    listening.hear_those_that_were_silent()
    assert is_answered(quick)
    sign()
    assert is_answered(slow)


def test_who_waits_to_be_accepted_has_a_turn_as_early_as_who_asks_again(
    listening: Listening,
) -> None:
    """With one accepted in each round of those that ask again, nobody else was in time."""
    others = [listening.client() for _ in range(20)]
    for client in others:
        client.send(request(EC))
    for _ in range(2):
        listening.hear()
    assert all(map(is_answered, others))
    waiting = [listening.client() for _ in range(40)]
    for client in waiting:
        client.send(request(RSA))
    sign = listening.hear()
    assert sign is not None
    sign()
    assert is_answered(waiting[0])
    for client in others:
        client.send(request(EC))
    # Each takes a turn, in the order in which they came.
    for client in [*waiting[1:], *others]:
        listening.turn()
        client.setblocking(False)
        assert is_answered(client)


def test_a_client_may_ask_again(listening: Listening) -> None:
    client = listening.client()
    client.send(request(EC))
    assert listening.hear() is None
    assert is_answered(client)
    for key in (RSA, EC):
        client.send(request(key))
        listening.turn()
        assert is_answered(client)
    assert listening.keyd.tally.totals()["signed"] == 3
    assert listening.kept == 1
    client.close()
    listening.turn()
    assert listening.is_idle
    assert not listening.kept


def test_what_is_asked_at_once_is_answered_in_turn(listening: Listening) -> None:
    client = listening.client()
    client.send(request(EC))
    client.send(request(EC))
    assert listening.hear() is None
    assert listening.keyd.tally.totals()["signed"] == 1
    listening.turn()
    assert is_answered(client)
    assert is_answered(client)


def test_whose_answer_is_lost_does_not_wait_for_it(listening: Listening) -> None:
    client = listening.client()
    client.send(request(EC))
    assert listening.hear() is None
    # It does not read: there is no room for another answer in the end.
    for _ in range(10_000):
        try:
            client.send(request(EC))
        except BrokenPipeError:
            break
        listening.turn()
    answers = 0
    while client.recv(2000):
        answers += 1
    assert answers == listening.keyd.tally.totals()["signed"] - 1
    assert listening.is_idle
    assert not listening.kept


def test_who_asks_again_for_what_no_server_signs_is_refused(listening: Listening) -> None:
    client = listening.client()
    client.send(request(EC))
    assert listening.hear() is None
    assert is_answered(client)
    client.send(request(EC)[:-1])
    listening.turn()
    assert is_answered(client, Status.NOT_TLS)
    assert listening.refusals == [(Status.NOT_TLS, os.getpid())]
    assert not listening.kept
    assert listening.is_idle


def test_a_key_that_has_gone_is_refused_to_who_asks_again(listening: Listening) -> None:
    client = listening.client()
    client.send(request(EC))
    assert listening.hear() is None
    assert is_answered(client)
    # As on SIGHUP.
    del listening.keys[key_id(EC.public_key())]
    client.send(request(EC))
    listening.turn()
    assert is_answered(client, Status.UNKNOWN_KEY)


def test_a_client_may_ask_again_for_a_while(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has sent before the end is answered."""
    monkeypatch.setattr(clients_module, "_LIFETIME_SECONDS", -1.0)
    client, quiet = listening.client(), listening.client()
    for one in (client, quiet):
        one.send(request(EC))
    assert listening.hear() is None
    for one in (client, quiet):
        assert is_answered(one)
    client.send(request(EC))
    listening.clients.tick()
    with pytest.raises(BrokenPipeError):
        client.send(request(EC))
    for _ in range(3):
        listening.turn()
    assert is_answered(client)
    assert is_left(client)
    assert is_left(quiet)
    assert listening.is_idle
    assert not listening.kept


def test_who_asks_again_has_no_more_time_for_that(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = listening.client()
    client.send(request(EC))
    assert listening.hear() is None
    [deadline] = listening.clients._kept.values()
    client.send(request(EC))
    listening.turn()
    assert list(listening.clients._kept.values()) == [deadline]


def test_of_many_the_one_that_was_idle_for_longest_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clients_module, "_MOST_KEPT", 2)
    with ExitStack() as stack:
        listening = Listening(stack)
        active, idle = listening.client(), listening.client()
        for one in (active, idle):
            one.send(request(EC))
        assert listening.hear() is None
        active.send(request(EC))
        listening.turn()
        newcomer = listening.client()
        newcomer.send(request(EC))
        assert listening.hear() is None
        listening.turn()
        assert is_answered(idle)
        assert is_left(idle)
        assert listening.kept == 2
        for one in (active, newcomer):
            one.send(request(EC))
            listening.turn()
            assert is_answered(one)
        assert is_answered(active)
        assert is_answered(newcomer)


def test_few_are_kept_where_descriptors_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients_module.resource, "getrlimit", lambda _: (4, 4))
    with ExitStack() as stack:
        listening = Listening(stack)
        clients = [listening.client() for _ in range(3)]
        for client in clients:
            client.send(request(EC))
        assert listening.hear() is None
        for _ in clients:
            listening.turn()
        assert listening.kept == 1


def test_what_no_server_signs_is_refused(listening: Listening) -> None:
    client = listening.client()
    client.send(request(EC)[:-1])
    assert listening.hear() is None
    assert is_answered(client, Status.NOT_TLS)
    assert listening.refusals == [(Status.NOT_TLS, os.getpid())]
    assert listening.keyd.tally.totals()["refused"] == {"not_tls": 1}


def test_a_client_that_has_left_takes_nothing_with_it(listening: Listening) -> None:
    listening.client().close()
    client = listening.client()
    client.send(request(EC))
    assert listening.hear() is None
    assert is_answered(client)
    assert listening.is_idle


def test_a_client_that_leaves_later_takes_nothing_with_it(listening: Listening) -> None:
    client = listening.client()
    assert listening.hear() is None
    assert not listening.is_idle
    client.close()
    listening.hear_those_that_were_silent()
    assert listening.is_idle
    assert not listening.refusals


def test_an_empty_packet_is_refused(listening: Listening) -> None:
    client = listening.client()
    client.send(b"")
    assert listening.hear() is None
    assert is_answered(client, Status.MALFORMED)
    assert listening.refusals == [(Status.MALFORMED, os.getpid())]
    assert listening.is_idle


def test_a_key_that_keyd_has_not_is_refused(listening: Listening) -> None:
    client = listening.client()
    client.send(Request(Operation.SIGN, SCHEMES[EC], bytes(32), CONTENT).encode())
    assert listening.hear() is None
    assert is_answered(client, Status.NOT_GRANTED)
    assert listening.is_idle


def test_a_silent_client_is_left_after_a_while(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = listening.client()
    assert listening.hear() is None
    monkeypatch.setattr(clients_module, "_LIFETIME_SECONDS", -1.0)
    silent, late = listening.client(), listening.client()
    assert listening.hear() is None
    late.send(request(EC))
    listening.clients.tick()
    for _ in range(3):
        listening.turn()
    assert is_answered(late)
    assert is_left(late)
    assert is_left(silent)
    patient.send(request(EC))
    listening.hear_those_that_were_silent()
    assert is_answered(patient)
    assert listening.is_idle


@pytest.fixture
def few_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients_module.resource, "getrlimit", lambda _: (4, 4))


def test_of_many_silent_clients_the_first_are_left(
    few_descriptors: None, listening: Listening
) -> None:
    silent = []
    for _ in range(3):
        silent.append(listening.client())
        listening.hear()
    listening.hear_those_that_were_silent()
    assert silent[0].recv(1) == b""
    # This one has asked meanwhile.
    silent[1].send(request(EC))
    silent.append(listening.client())
    listening.hear()
    listening.hear_those_that_were_silent()
    for client in silent[2:]:
        client.send(request(EC))
    listening.hear_those_that_were_silent()
    assert all(map(is_answered, silent[1:]))
    listening.hear_those_that_were_silent()
    assert listening.is_idle
    assert not listening.refusals


def test_a_client_that_cannot_be_watched_is_left(
    listening: Listening, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the user of keyd has all watches that epoll(7) gives one (max_user_watches)."""

    class Full:
        def register(self, *_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(listening.keyd, "epoll", Full())
        silent = listening.client()
        listening.hear()
        assert silent.recv(1) == b""
    assert "no room for another connection: No space left" in capsys.readouterr().err
    assert listening.is_idle
    client = listening.client()
    client.send(request(EC))
    listening.hear()
    assert is_answered(client)


# --- keys that are elsewhere -----------------------------------------------------------------


@pytest.mark.parametrize("when", ["at once", "later", "again"])
def test_a_key_elsewhere_answers_when_it_has(listening: Listening, when: str) -> None:
    token = listening.keys[key_id(RSA.public_key())] = InToken()
    done, failed = listening.client(), listening.client()
    for client in (done, failed):
        if when != "later":
            client.send(request(RSA if when == "at once" else EC))
    assert listening.hear() is None
    for client in (done, failed):
        if when == "again":
            assert is_answered(client)
        if when != "at once":
            client.send(request(RSA))
            listening.turn()
    listening.leave()
    assert not listening.left
    token.asked[0](b"a signature")
    assert Reply.decode(done.recv(2000)) == Reply(Status.DONE, b"a signature")
    assert is_left(done)
    token.asked[1]("no")
    assert is_answered(failed, Status.FAILED)
    assert listening.left
    assert listening.is_idle


@pytest.mark.parametrize("first", [None, EC], ids=["first", "again"])
def test_nobody_is_heard_who_has_not_been_answered(
    listening: Listening, first: ec.EllipticCurvePrivateKey | None
) -> None:
    token = listening.keys[key_id(RSA.public_key())] = InToken()
    client = listening.client()
    if first is not None:
        client.send(request(first))
    assert listening.hear() is None
    for _ in range(2):
        client.send(request(RSA))
    for _ in range(2):
        listening.turn()
    assert len(token.asked) == 1
    token.asked[0]("no")
    assert listening.is_idle


# --- keyd leaves -----------------------------------------------------------------------------


def test_a_client_that_was_accepted_is_answered_before_keyd_leaves(listening: Listening) -> None:
    """keyd is told to leave when it has accepted a client, and has not yet taken it in."""
    listening.accepting = listening.leave
    client = listening.client()
    client.send(request(EC))
    listening.hear()
    assert not listening.left
    assert is_answered(client)
    listening.turn()
    assert is_left(client)
    assert listening.left


def test_who_has_asked_nothing_does_not_hold_up_keyd(listening: Listening) -> None:
    """It cannot send any more: its request is the next keyd's. What it has sent is answered."""
    silent, late = listening.client(), listening.client()
    listening.hear()
    late.send(request(EC))
    listening.leave()
    assert not listening.left
    for one in (silent, late):
        with pytest.raises(BrokenPipeError):
            one.send(request(EC))
    for _ in range(3):
        listening.turn()
    assert is_answered(late)
    assert is_left(late)
    assert is_left(silent)
    assert listening.left


def test_who_is_accepted_as_keyd_leaves_does_not_hold_it_up(listening: Listening) -> None:
    listening.accepting = listening.leave
    silent = listening.client()
    listening.hear()
    with pytest.raises(BrokenPipeError):
        silent.send(request(EC))
    listening.turn()
    assert is_left(silent)
    assert listening.left


def test_who_may_ask_again_does_not_hold_up_keyd(listening: Listening) -> None:
    """What it has asked is answered: with a new keyd, it would ask again."""
    idle, client = listening.client(), listening.client()
    for one in (idle, client):
        one.send(request(EC))
    assert listening.hear() is None
    for one in (idle, client):
        assert is_answered(one)
    client.send(request(EC))
    listening.leave()
    assert not listening.left
    for _ in range(3):
        listening.turn()
    assert is_left(idle)
    assert is_answered(client)
    assert is_left(client)
    assert listening.left


def test_a_slow_key_signs_before_keyd_leaves(listening: Listening) -> None:
    client = listening.client()
    client.send(request(RSA))
    sign = listening.hear()
    assert sign is not None
    listening.leave()
    assert not listening.left
    sign()
    assert is_answered(client)
    listening.turn()
    assert listening.left


def test_without_a_client_keyd_leaves_at_once(listening: Listening) -> None:
    listening.hear()
    listening.leave()
    assert listening.left
