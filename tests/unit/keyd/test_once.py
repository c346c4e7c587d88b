"""Clients of ``keyd listen``: each is answered once, at once; no slow key holds up the others."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from keyd.daemon import Keyd
from keyd.powers import ALL_POWERS, Key
from keyd.protocol import Done, Open, Operation, Refusal, Reply, Request, SignatureScheme, Status
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


class Listening:
    """A keyd that hears a listener only when it is told to."""

    def __init__(self, stack: ExitStack) -> None:
        self.keys: dict[bytes, Key] = {key_id(EC.public_key()): EC}
        self.keyd = Keyd(self.keys)
        # As on SIGHUP.
        self.keys |= {key_id(key.public_key()): key for key in (RSA, PSS)}
        self.reports: list[Refusal | Done] = []
        self._listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        self._stack = stack
        self._listener.bind("")
        self._listener.listen()
        terms = Open(0, lifetime_ms=60_000, operations=1, grants=0)
        grants = dict.fromkeys(self.keys, ALL_POWERS)
        self.keyd.hear_listener(
            self._listener,
            lambda client: self.keyd.open_once(terms, grants, client, self.reports.append),
        )
        self.hear: Callable[[], Callable[[], None] | None] = self.keyd._sources[
            self._listener.fileno()
        ].hear

    def client(self) -> socket.socket:
        made = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        made.settimeout(10)
        made.connect(self._listener.getsockname())
        return made

    def ready_channels(self) -> None:
        for descriptor, _ in self.keyd.epoll.poll(0):
            if descriptor in self.keyd._channels:
                self.keyd._answer(descriptor, self.keyd._channels[descriptor])


@pytest.fixture
def listening() -> Iterator[Listening]:
    with ExitStack() as stack:
        yield Listening(stack)


def is_answered(client: socket.socket, status: Status = Status.DONE) -> bool:
    """And nothing comes after that but the end."""
    return Reply.decode(client.recv(2000)).status is status and client.recv(1) == b""


def test_all_that_have_asked_are_answered_at_once(listening: Listening) -> None:
    clients = [listening.client() for _ in range(3)]
    for client in clients:
        client.send(request(EC))
    assert listening.hear() is None
    assert all(is_answered(client) for client in clients)
    assert listening.reports == [Done(0, Operation.SIGN)] * 3
    assert not listening.keyd._channels


def test_who_asks_later_is_answered_then(listening: Listening) -> None:
    late, quick = listening.client(), listening.client()
    quick.send(request(EC))
    assert listening.hear() is None
    assert is_answered(quick)
    late.send(request(RSA))
    listening.ready_channels()
    assert is_answered(late)


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
    assert listening.hear() is None
    assert is_answered(quick)
    sign()
    assert is_answered(slow)


def test_one_request_is_all(listening: Listening) -> None:
    client = listening.client()
    client.send(request(EC))
    client.send(request(EC))
    assert listening.hear() is None
    # Of what it was sent twice, keyd has read one: that is a reset, and the provider never does it.
    with pytest.raises(ConnectionResetError):
        client.recv(2000)
    assert listening.reports == [Done(0, Operation.SIGN)]


def test_what_no_server_signs_is_refused(listening: Listening) -> None:
    client = listening.client()
    client.send(request(EC)[:-1])
    assert listening.hear() is None
    assert is_answered(client, Status.NOT_TLS)
    (refusal,) = listening.reports
    assert isinstance(refusal, Refusal)


def test_a_client_that_has_left_takes_nothing_with_it(listening: Listening) -> None:
    listening.client().close()
    client = listening.client()
    client.send(request(EC))
    assert listening.hear() is None
    assert is_answered(client)
    assert not listening.keyd._channels
