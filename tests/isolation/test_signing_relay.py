"""Signatures made through one taken-over worker after the other: counted, visible, bounded."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from integration.certificates import Certificate
from integration.instance import Instance
from integration.peers import Listener, connect, echo, served_by, was_reset

from keyd.protocol import Operation, Reply, Request, SignatureScheme, Status
from keyd.reference import key_id
from titus_py.supervisor.control_client import ask

from .harness import Relay, infected, make_certificate, over_tls

HANDSHAKE = b" " * 64 + b"TLS 1.3, server CertificateVerify\0" + bytes(32)
PER_PREFIX = 4


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return make_certificate(tmp_path)


@pytest.fixture
def backend() -> Iterator[Listener]:
    with Listener.tcp() as listener, served_by(listener, echo):
        yield listener


@pytest.fixture
def instance(certificate: Certificate, backend: Listener, tmp_path: Path) -> Iterator[Instance]:
    limits = {"unfinished": {"per_prefix": PER_PREFIX, "every": "1h"}}
    with infected(tmp_path, certificate, backend.address, limits=limits) as instance:
        yield instance


def sign_and_leave(instance: Instance, certificate: Certificate) -> str:
    """A signature, through a worker that is taken over for it; returns the client's name."""
    key = serialization.load_pem_private_key(certificate.key.read_bytes(), None).public_key()
    message = Request(
        Operation.SIGN,
        SignatureScheme.ecdsa_secp256r1_sha256,
        key_id(key),
        HANDSHAKE,
    )
    relay = Relay(instance)
    assert Reply.decode(relay.ask(message.encode())).status is Status.DONE
    relay.close()
    return relay.client


def test_a_relay_is_counted_and_seen_and_then_refused(
    instance: Instance, certificate: Certificate
) -> None:
    # The control: who comes to the backend is not counted.
    for _ in range(PER_PREFIX + 1):
        assert over_tls(instance, "localhost", b"honest") == b"honest"
    clients = []
    for _ in range(PER_PREFIX):
        clients.append(sign_and_leave(instance, certificate))
        instance.wait_for_event("handshake_failed", client=clients[-1], unfinished=True)
    # The reset may come before connect(2) has returned.
    with suppress(ConnectionResetError), connect(instance.port) as refused:
        assert was_reset(refused)
    event = instance.wait_for_event("limited", limit="unfinished")
    assert event["level"] == "warning"
    assert "limits.unfinished" in event["advice"]
    # One line for an address, however many there are.
    [first] = instance.events_named("signed_unfinished")
    assert first["client"] == clients[0]
    ended = [event for event in instance.events() if event.get("unfinished")]
    assert [event["client"] for event in ended] == clients
    counts = ask(instance.pid, {"do": "status"}, 10)["counts"]
    assert counts["unfinished"] == {f"127.0.0.1:{instance.port}": PER_PREFIX}
