"""Signatures made through one taken-over worker after the other: counted, visible, bounded.

The attacker's TLS server is OpenSSL's own, with the public certificate and the reference that
anybody can make of it. Each signature that it needs comes from keyd, through a worker that is taken
over for it.
"""

import os
import socket
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from integration.certificates import Certificate
from integration.hellos import TLS12
from integration.instance import Event, Instance, eventually, free_port
from integration.peers import TIMEOUT, Listener, TlsClient, connect, was_reset

from keyd.protocol import MAX_REQUEST_OCTETS, Operation, Reply, Request, SignatureScheme, Status
from keyd.provider import openssl_configuration
from keyd.reference import key_id
from titus_py.supervisor.control_client import ask

from .harness import Relay, infected

PER_PREFIX = 4
LIMITED = {"unfinished": {"per_prefix": PER_PREFIX, "every": "1h"}}
#: Far more than any of this takes.
AS_GOOD_AS_OFF = {"unfinished": {"per_prefix": 1000, "every": "1h"}}
#: Networks of this machine's: whom the attacker connects from, and others.
ATTACKERS, ANOTHERS, ALARMING, HONEST = "127.1.1.1", "127.1.2.2", "127.1.4.4", "127.1.3.3"


def come_from(address: str, instance: Instance) -> socket.socket:
    """A connection to the instance from this address; raises ConnectionResetError."""
    return socket.create_connection(("127.0.0.1", instance.port), TIMEOUT, (address, 0))


class Oracle:
    """Stands in for keyd: each request goes to the real one, through one more worker."""

    def __init__(self, path: Path, instance: Instance) -> None:
        self.address = ATTACKERS
        #: The connections that it took over.
        self.clients: list[str] = []
        self._instance = instance
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                channel, _ = self._listener.accept()
                # Nothing is had from a network that is over its limit: the channel ends.
                with channel, suppress(ConnectionResetError):
                    channel.send(self._ask(channel.recv(MAX_REQUEST_OCTETS)))

    def _ask(self, message: bytes) -> bytes:
        """Whoever the victim is: this client asks for the version, and sends the random."""
        octets = Request.decode(message).payload
        tls13 = octets.startswith(b" " * 64)
        hello = {} if tls13 else {"random": octets[:32], "versions": [TLS12]}
        relay = Relay(self._instance, source=come_from(self.address, self._instance), hello=hello)
        try:
            self.clients.append(relay.client)
            return relay.ask(message)
        finally:
            relay.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(TIMEOUT)
        self._listener.close()


@contextmanager
def attackers_server(directory: Path, certificate: Path, keyd: Path) -> Iterator[int]:
    """OpenSSL's server with what is public of a site, and keyd at this socket; yields its port."""
    reference = subprocess.run(
        [Path(sys.executable).with_name("keyd"), "reference", certificate],
        check=True,
        capture_output=True,
    )
    (directory / "reference").write_bytes(reference.stdout)
    configuration = directory / "openssl.cnf"
    configuration.write_text(openssl_configuration(f"socket = {keyd}"))
    port = free_port()
    site = ["-cert", certificate, "-key", directory / "reference"]
    with subprocess.Popen(
        ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-www", *site],
        env={**os.environ, "OPENSSL_CONF": str(configuration)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            eventually(lambda: _listens(port), "the attacker's server")
            yield port
        finally:
            server.kill()


def _listens(port: int) -> bool:
    """Without a connection, which would be a victim's."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1:4:2] == [f"0100007F:{port:04X}", "0A"] for line in lines)


def is_deceived(port: int, authority: Path, version: ssl.TLSVersion) -> bool:
    """Whether a client that verifies the certificate and the name takes this for the site."""
    context = ssl.create_default_context(cafile=str(authority))
    context.minimum_version = context.maximum_version = version
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="localhost") as client:
                return client.version() is not None
        except (ssl.SSLError, ConnectionResetError):
            return False


def unfinished_of(instance: Instance) -> list[Event]:
    return [event for event in instance.events() if event.get("unfinished")]


def are_counted(instance: Instance, metrics: int, count: int) -> None:
    """So many, in the status and in the metrics, whose text may be a moment old."""
    listener = f"127.0.0.1:{instance.port}"
    counts = ask(instance.pid, {"do": "status"}, 60)["counts"]
    assert counts["unfinished"] == {listener: count}
    line = f'titus_signed_unfinished_total{{listener="{listener}"}} {count}\n'

    def in_metrics() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=60) as answer:
            return line in answer.read().decode()

    eventually(in_metrics, line)


@pytest.mark.parametrize("limits", [LIMITED, AS_GOOD_AS_OFF], ids=["limited", "not limited"])
def test_a_server_that_has_every_signature_from_keyd(
    certificate: Certificate, backend: Listener, tmp_path: Path, limits: dict[str, object]
) -> None:
    """It passes for the site while it may; the second instance, without the limit, is the control.

    Victims come with TLS 1.2; each takes a signature. One of TLS 1.3 is never deceived: keyd signs
    for the ClientHello that its parent has seen, and the attacker's has to ask for its hole.
    """
    metrics, tls13 = free_port(), ssl.TLSVersion.TLSv1_3
    tables = {"limits": limits, "metrics": {"address": f"127.0.0.1:{metrics}"}}
    keyd, more = tmp_path / "keyd", 2
    versions = [ssl.TLSVersion.TLSv1_2] * PER_PREFIX
    with ExitStack() as stack:
        instance = stack.enter_context(infected(tmp_path, certificate, backend.address, **tables))
        oracle = Oracle(keyd, instance)
        stack.callback(oracle.close)
        port = stack.enter_context(attackers_server(tmp_path, certificate.certificate, keyd))

        def victims(*versions: ssl.TLSVersion) -> list[bool]:
            return [is_deceived(port, certificate.authority, version) for version in versions]

        oracle.address = ALARMING
        assert victims(tls13, tls13) == [False, False]
        assert len(oracle.clients) == 2
        for client in oracle.clients:
            refused = instance.wait_for_event("keyd_refused", client=client)
            assert refused["level"] == "alarm"
            assert "whose messages have not come" in refused["attempted"]
        oracle.clients.clear()
        oracle.address = ATTACKERS
        # As long as the hole is open, and the limit is not reached, it is the site.
        assert victims(*versions) == [True] * PER_PREFIX
        found = eventually(lambda: _if_as_many(unfinished_of(instance), PER_PREFIX), "their ends")
        assert sorted(event["client"] for event in found) == sorted(oracle.clients)
        are_counted(instance, metrics, PER_PREFIX)
        # One line for an address, however many there are.
        [first] = instance.events_named("signed_unfinished")
        assert first["client"] == found[0]["client"]

        assert victims(*versions[:more]) == [limits is not LIMITED] * more
        if limits is not LIMITED:
            eventually(lambda: _if_as_many(unfinished_of(instance), PER_PREFIX + more), "more")
            are_counted(instance, metrics, PER_PREFIX + more)
            assert not instance.events_named("limited")
            return
        # Neither a worker nor a signature was had for those.
        assert len(oracle.clients) == PER_PREFIX
        event = instance.wait_for_event("limited", limit="unfinished", last_client=ATTACKERS)
        assert event["level"] == "warning"
        assert "limits.unfinished" in event["advice"]
        are_counted(instance, metrics, PER_PREFIX)
        # Others are served, however many they are; and an attacker has each network's share.
        for _ in range(PER_PREFIX + 1):
            honest_client_is_served(instance, certificate.authority)
        oracle.address = ANOTHERS
        assert victims(versions[0]) == [True]


def _if_as_many(events: list[Event], count: int) -> list[Event]:
    return events if len(events) >= count else []


def honest_client_is_served(instance: Instance, authority: Path) -> None:
    with TlsClient(
        instance.port, "localhost", authority, source=come_from(HONEST, instance)
    ) as client:
        client.handshake()
        client.send(b"honest")
        assert client.receive_exactly(6) == b"honest"


def test_workers_that_are_held_until_all_have_signed(
    certificate: Certificate, backend: Listener, tmp_path: Path
) -> None:
    """The limit counts ends: who is there already is signed for. Then it is over, for long."""
    at_once = PER_PREFIX + 2
    limits = {**LIMITED, "connections_per_prefix": at_once}
    key = serialization.load_pem_private_key(certificate.key.read_bytes(), None).public_key()

    def message(relay: Relay) -> bytes:
        scheme = SignatureScheme.ecdsa_secp256r1_sha256
        return Request(Operation.SIGN, scheme, key_id(key), relay.handshake()).encode()

    with infected(tmp_path, certificate, backend.address, limits=limits) as instance:
        held = [Relay(instance) for _ in range(at_once)]
        # No more than these fit in.
        with suppress(ConnectionResetError), connect(instance.port) as one_more:
            assert was_reset(one_more)
        for relay in held:
            assert Reply.decode(relay.ask(message(relay))).status is Status.DONE
            relay.close()
        eventually(lambda: _if_as_many(unfinished_of(instance), at_once), "their ends")
        for _ in range(2):
            with pytest.raises(ConnectionResetError):
                Relay(instance)
        instance.wait_for_event("limited", limit="unfinished")
