"""A tunnel's worker that its server has taken over: what it can have signed, what it reaches.

And a virtual host's: the two kinds of keys and channels are apart.
"""

import platform
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.x509 import load_pem_x509_certificate
from integration.certificates import Certificate
from integration.client_authority import ClientAuthority, ClientCertificate
from integration.instance import Instance, eventually, free_port
from integration.peers import TIMEOUT, Listener, connect, echo, served_by

from keyd.protocol import Operation, Reply, Request, SignatureScheme, Status
from keyd.reference import key_id

from .attacks import ATTEMPTS, KILLED, Attempt
from .harness import Relay, infected, make_certificate, one_more_connection, take_over

AS_A_SERVER = b" " * 64 + b"TLS 1.3, server CertificateVerify\0" + bytes(32)
AS_A_CLIENT = b" " * 64 + b"TLS 1.3, client CertificateVerify\0" + bytes(32)
KEY_EXCHANGE = bytes(64) + b"\3\0\x1d\x20" + bytes(32)


class Scene(NamedTuple):
    """An instance with a virtual host and two tunnels to servers of an attacker's."""

    instance: Instance
    server: Listener
    site: Certificate
    own: ClientCertificate
    #: Where the tunnel listens that has a key, and the one that has none.
    keyed: int
    keyless: int


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("tunnels")
    site = make_certificate(directory)
    own = ClientAuthority(directory / "clients").issue(self_signed=True)
    with (
        Listener.tcp() as server,
        Listener.tcp() as backend,
        served_by(backend, echo),
    ):
        common: dict[str, Any] = {"connect": server.address, "pins": [own.spki]}
        keyed, keyless = free_port(), free_port()
        tunnels = [
            {"listen": f"127.0.0.1:{keyed}", "certificate": own.chain, "key": own.key, **common},
            {"listen": f"127.0.0.1:{keyless}", **common},
        ]
        instance_directory = directory / "instance"
        instance_directory.mkdir()
        with infected(
            instance_directory, site, backend.address, lasting=True, tunnel=tunnels
        ) as instance:
            instance.expected_alarms.add("tunnel_failed")
            yield Scene(instance, server, site, own, keyed, keyless)


class Taken:
    """A tunnel's worker that does what its client says, and answers to its server."""

    def __init__(self, scene: Scene, order: str, port: int) -> None:
        self._client = connect(port)
        self.name = "{}:{}".format(*self._client.getsockname())
        self._client.sendall(f"t.{order}.attack.test".encode())
        self.server = scene.server.accept()
        self.server.settimeout(TIMEOUT)

    def ask(self, request: Request) -> Reply:
        """keyd's answer, by way of the ``relay``."""
        assert self.server.recv(2, socket.MSG_WAITALL) == bytes(2)
        self.server.sendall(request.encode())
        head = self.server.recv(2, socket.MSG_WAITALL)
        return Reply.decode(self.server.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))

    def outcome(self) -> str:
        """What the worker said; empty if it ended without a word."""
        said = bytearray()
        try:
            while piece := self.server.recv(4096):
                said += piece
        except ConnectionResetError:
            pass
        return said.decode()

    def close(self) -> None:
        self.server.close()
        self._client.close()


def key_of(certificate: Path) -> bytes:
    return key_id(load_pem_x509_certificate(certificate.read_bytes()).public_key())  # type: ignore[arg-type]


def request(key: bytes, payload: bytes, operation: Operation = Operation.SIGN) -> Request:
    return Request(operation, SignatureScheme.ecdsa_secp256r1_sha256, key, payload)


def test_a_client_signature_is_what_a_tunnel_has(scene: Scene) -> None:
    """The control: asked for what an honest worker asks for, keyd signs."""
    with closing(Taken(scene, "relay.0", scene.keyed)) as taken:
        reply = taken.ask(request(key_of(scene.own.chain), AS_A_CLIENT))
    assert reply.status is Status.DONE
    assert reply.payload


@pytest.mark.parametrize("payload", [AS_A_SERVER, KEY_EXCHANGE], ids=["TLS 1.3", "TLS 1.2"])
@pytest.mark.parametrize("whose", ["its own key", "the virtual host's"])
def test_no_server_signature_for_a_tunnel(scene: Scene, payload: bytes, whose: str) -> None:
    file = scene.own.chain if whose == "its own key" else scene.site.certificate
    with closing(Taken(scene, "relay.0", scene.keyed)) as taken:
        reply = taken.ask(request(key_of(file), payload))
    assert reply == Reply(Status.NOT_GRANTED)
    assert scene.instance.wait_for_event("keyd_refused", client=taken.name)


def test_nothing_is_decrypted_for_a_tunnel(scene: Scene) -> None:
    with closing(Taken(scene, "relay.0", scene.keyed)) as taken:
        reply = taken.ask(request(key_of(scene.own.chain), bytes(256), Operation.DECRYPT))
    assert reply == Reply(Status.NOT_GRANTED)


@pytest.mark.parametrize("whose", ["the tunnel's key", "its own"])
def test_no_client_signature_for_a_virtual_host(scene: Scene, whose: str) -> None:
    file = scene.own.chain if whose == "the tunnel's key" else scene.site.certificate
    with closing(Relay(scene.instance)) as relay:
        reply = Reply.decode(relay.ask(request(key_of(file), AS_A_CLIENT).encode()))
    wanted = Status.NOT_GRANTED if whose == "the tunnel's key" else Status.NOT_TLS
    assert reply == Reply(wanted)


def test_a_tunnel_without_a_key_has_no_way_to_keyd(scene: Scene) -> None:
    """What would be the channel's descriptor is its client."""
    with closing(Taken(scene, "nothing", scene.keyless)) as taken:
        assert taken.outcome() == "nothing"


REACHING = {
    "read a file",
    "connect",
    "connect by IPv6",
    "connect to an abstract unix socket",
    "connect the client's socket to elsewhere",
    "bind and listen",
    "pass a descriptor to the parent",
    "pass a descriptor to keyd",
    "fork",
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="system calls by their numbers")
@pytest.mark.parametrize(
    ("number", "attempt"),
    [(number, one) for number, one in enumerate(ATTEMPTS) if one.what in REACHING],
    ids=sorted(REACHING, key=[one.what for one in ATTEMPTS].index),
)
def test_it_reaches_nothing_but_its_two_sockets(
    scene: Scene, number: int, attempt: Attempt
) -> None:
    """The same attempts as of any worker: ``test_attacks`` shows them succeed without what stops
    them.
    """
    given = {"port": scene.instance.port, "number": 1}
    words = ".".join([str(number), *(str(given[one]) for one in attempt.given)])
    with closing(Taken(scene, words, scene.keyed)) as taken:
        outcome = taken.outcome()
    if attempt.stopped == KILLED:
        event = scene.instance.wait_for_event("tunnel_failed", client=taken.name)
        assert (event["level"], event["end"], outcome) == ("alarm", KILLED, "")
    else:
        assert outcome == attempt.stopped


@pytest.mark.parametrize(
    "octets", ["44000000ff", "440000ff", "45" * 2, "50" + "00" * 37, "49" + "ff" * 30]
)
def test_what_a_tunnel_does_not_say_is_an_alarm(scene: Scene, octets: str) -> None:
    """A dial among them: a tunnel's worker asks for no backend."""
    with closing(Taken(scene, f"burst.parent.{octets}", scene.keyed)) as taken:
        taken.outcome()

    def alarms() -> list[str]:
        events = scene.instance.events()
        return [
            event["event"]
            for event in events
            if (event["level"], event.get("client")) == ("alarm", taken.name)
        ]

    # Its own end has no line where another worker of this tunnel ends in the same second.
    alarm, *_ = eventually(alarms, "an alarm")
    assert alarm in ("unexpected_message", "malformed_message")


def test_established_is_said_once(scene: Scene) -> None:
    """Said by a worker that was taken over, it is believed: nobody gains anything by that."""
    with closing(Taken(scene, "burst.parent.45.45", scene.keyed)) as taken:
        taken.outcome()
    alarm = scene.instance.wait_for_event("unexpected_message", client=taken.name)
    assert alarm["attempted"] == "Established()"


def test_a_virtual_host_is_not_established(scene: Scene) -> None:
    result = take_over(scene.instance, "h", "burst", "parent", "45")
    assert [alarm["event"] for alarm in result.alarms] == ["unexpected_message"]
    one_more_connection(scene.instance)
