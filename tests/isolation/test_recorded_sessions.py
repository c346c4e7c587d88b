"""A session that was recorded, and workers that are taken over later to decrypt its secret.

With ``rsa_key_exchange``, each does that for one: it is off by default, warned of, and for a key
that no other virtual host has. That key is no help against those who connect to other sites.
"""

import hashlib
import hmac
import socket
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from integration.certificates import Certificate
from integration.instance import TITUS_PY, Instance, free_port, toml
from integration.peers import TIMEOUT, Listener, TlsClient
from OpenSSL import SSL

from keyd.protocol import Operation, Reply, Request, SignatureScheme, Status
from keyd.reference import key_id

from .harness import Relay, infected, make_certificate

TLS12 = (SSL.TLS1_2_VERSION, SSL.TLS1_2_VERSION)


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return make_certificate(tmp_path, "RSA-2048")


class Recorded(NamedTuple):
    """What a tap on a client's connection has of its handshake, and what only the client knows."""

    ciphertext: bytes
    transcript: bytes
    master_secret: bytes

    def is_from(self, premaster: bytes) -> bool:
        """RFC 7627 §4."""
        return _prf(premaster, b"extended master secret" + _sha256(self.transcript)) == (
            self.master_secret
        )


def _sha256(octets: bytes) -> bytes:
    return hashlib.sha256(octets).digest()


def _prf(secret: bytes, seed: bytes) -> bytes:
    """48 octets of it with SHA-256 (RFC 5246 §5)."""

    def mac(octets: bytes) -> bytes:
        return hmac.digest(secret, octets, "sha256")

    first = mac(seed)
    return (mac(first + seed) + mac(mac(first) + seed))[:48]


class Tapped(socket.socket):
    """A client's socket that keeps what it sends."""

    sent = b""

    def sendall(self, octets: Any, flags: int = 0) -> None:
        self.sent += bytes(octets)
        super().sendall(octets, flags)


def record(instance: Instance) -> Recorded:
    """A client without ECDHE, as it is seen on the way."""
    plain = Tapped()
    plain.settimeout(TIMEOUT)
    plain.connect(("127.0.0.1", instance.port))
    with TlsClient(
        instance.port, versions=TLS12, ciphers="AES128-GCM-SHA256", source=plain
    ) as client:
        client.handshake()
        hello, exchange = _messages(plain.sent)
        servers = _messages(client.received)
        transcript = b"".join([hello, *servers, exchange])
        return Recorded(exchange[6:], transcript, client.tls.master_key())


def _messages(octets: bytes) -> list[bytes]:
    """Handshake messages in the clear (RFC 5246 §6.2.1, §7.4)."""
    stream = b""
    while octets and octets[0] != 20:  # change_cipher_spec: what follows is encrypted
        length = int.from_bytes(octets[3:5], "big")
        stream, octets = stream + octets[5 : 5 + length], octets[5 + length :]
    messages = []
    while stream:
        length = 4 + int.from_bytes(stream[1:4], "big")
        messages.append(stream[:length])
        stream = stream[length:]
    return messages


def sites(**others: Any) -> dict[str, Any]:
    """Two sites on two ports: one for old clients, and one with the same key unless ``others``."""
    ports = [free_port(), free_port()]
    return {
        "listen": [{"address": f"127.0.0.1:{port}"} for port in ports],
        "vhost": [
            {"local_port": ports[0], "rsa_key_exchange": True},
            {"local_port": ports[1], **others},
        ],
    }


def asked(
    instance: Instance, operation: Operation, certificate: Certificate, octets: bytes = b""
) -> Reply:
    """keyd, through a worker that was taken over; to sign, for that worker's own client."""
    key = load_pem_private_key(certificate.key.read_bytes(), None).public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    signs = operation is Operation.SIGN
    parameter = SignatureScheme.rsa_pss_rsae_sha256 if signs else 0x0303
    relay = Relay(instance)
    if signs:
        octets = relay.handshake()
    try:
        return Reply.decode(relay.ask(Request(operation, parameter, key_id(key), octets).encode()))
    finally:
        relay.close()


def test_a_key_of_its_own_decrypts_what_was_recorded(
    certificate: Certificate, backend: Listener, tmp_path: Path
) -> None:
    """What is promised of ``rsa_key_exchange``, no more; and the control of what follows."""
    other = make_certificate(tmp_path, "P-256")
    tables = sites(certificate=other.certificate, key=other.key)
    with infected(tmp_path, certificate, backend.address, **tables) as instance:
        recorded = record(instance)
        reply = asked(instance, Operation.DECRYPT, certificate, recorded.ciphertext)
        assert reply.status is Status.DONE
        assert recorded.is_from(reply.payload)


def test_a_key_that_others_sign_with_is_refused_by_the_check_and_at_the_start(
    certificate: Certificate, backend: Listener, tmp_path: Path
) -> None:
    tables = sites()
    files = {"certificate": certificate.certificate, "key": certificate.key}
    tables["vhost"] = [{**files, "backend": backend.address, **one} for one in tables["vhost"]]
    file = tmp_path / "titus.toml"
    file.write_text(toml(tables))
    for command in ("check", "serve"):
        ran = subprocess.run(
            [TITUS_PY, command, "--config", file], capture_output=True, text=True, timeout=240
        )
        assert ran.returncode == 2
        assert "rsa_key_exchange: its key also signs for" in ran.stdout + ran.stderr


@pytest.mark.parametrize("one_listener", [True, False])
def test_keyd_refuses_to_decrypt_with_it_whatever_the_check_said(
    certificate: Certificate, backend: Listener, tmp_path: Path, one_listener: bool
) -> None:
    """Without the check: keyd signs for both, and decrypts for neither."""
    tables = sites()
    if one_listener:
        tables["vhost"] = [{"sni": ["a.test"], "rsa_key_exchange": True}, {}]
    with infected(tmp_path, certificate, backend.address, ["own key"], **tables) as instance:
        encrypted = _encrypted_for(certificate)
        reply = asked(instance, Operation.DECRYPT, certificate, encrypted)
        assert reply == Reply(Status.NOT_GRANTED)
        event = instance.wait_for_event("keyd_refused", status="not_granted")
        assert "decrypt with key" in event["attempted"]
        # The way to keyd and the key are as before.
        assert asked(instance, Operation.SIGN, certificate).status is Status.DONE


def _encrypted_for(certificate: Certificate) -> bytes:
    key = x509.load_pem_x509_certificate(certificate.certificate.read_bytes()).public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    return key.encrypt(b"\3\3" + bytes(46), padding.PKCS1v15())
