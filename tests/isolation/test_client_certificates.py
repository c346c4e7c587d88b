"""What a worker that was taken over before its handshake can do without a certificate.

Who a client is, is its worker's word: docs/threat-model.md says so, and this shows it.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.certificates import Certificate
from integration.client_authority import ClientAuthority
from integration.instance import Instance
from integration.peers import TIMEOUT, Listener, TlsClient, was_reset

from titus_py.between.client_identity import Identity

from .harness import infected, make_certificate, take_over
from .infected_fork_server import IDENTITY


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def backend() -> Iterator[Listener]:
    with Listener.tcp() as listener:
        listener.socket.setblocking(False)
        yield listener


@pytest.fixture
def instance(certificate: Certificate, backend: Listener, tmp_path: Path) -> Iterator[Instance]:
    authority = ClientAuthority(tmp_path / "clients")
    vhost = {
        "client_certificates": "required",
        "client_ca": authority.file,
        "client_allow": {"cn": ["alice"]},
    }
    with infected(tmp_path, certificate, backend.address, vhost=[vhost]) as instance:
        yield instance


def test_without_an_identity_it_reaches_nothing(instance: Instance, backend: Listener) -> None:
    """Our code always makes one out: who does not is not our code."""
    result = take_over(instance, "h", "burst", "parent", "440000ff")
    [alarm] = [event for event in result.alarms if event["event"] == "unexpected_message"]
    assert alarm["attempted"] == "Dial(vhost=0, protocol=None, facts=None)"
    with pytest.raises(BlockingIOError):
        backend.accept()


@pytest.mark.parametrize("octets", ["49", "49" + "00" * 30, "49" + "ff" * 30])
def test_no_identity_is_an_alarm(instance: Instance, backend: Listener, octets: str) -> None:
    result = take_over(instance, "h", "burst", "parent", octets, "440000ff")
    assert [event["event"] for event in result.alarms] == ["malformed_message"]
    with pytest.raises(BlockingIOError):
        backend.accept()


def test_an_identity_that_is_made_up_is_believed(instance: Instance, backend: Listener) -> None:
    """The parent cannot tell it from a true one: this is what the threat model states."""
    with TlsClient(instance.port, "h.impersonate.alice.attack.test") as client:
        client.socket.sendall(client.first_flight())
        name = "{}:{}".format(*client.socket.getsockname())
        backend.socket.settimeout(TIMEOUT)
        backend.accept().close()
    assert instance.wait_for_event("connection_begun", client=name)
    assert not instance.events_named("unexpected_message")


def test_twice_is_an_alarm(instance: Instance) -> None:
    result = take_over(instance, "h", "impersonate", "alice", "bob")
    assert [event["event"] for event in result.alarms] == ["unexpected_message"]
    assert "bob" in result.alarms[0]["attempted"]


def test_fuzzing(instance: Instance) -> None:
    """Whatever a worker makes up to be an identity: only its own connection ends."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    assert Identity.decode(IDENTITY).facts.cn == ("alice",)
    parent = instance.parent()
    for number in range(10):
        with TlsClient(instance.port, f"h.fuzz.parent.{seed + number}.100.attack.test") as client:
            client.socket.sendall(client.first_flight())
            was_reset(client.socket)
    ends = instance.wait_for_events(10, "handshake_failed")
    # A worker may have said its last word before the parent has heard the first.
    alarms = {"malformed_message", "unexpected_message"}
    assert {event["end"] for event in ends} <= alarms | {"handshake_failed"}
    assert instance.events_named("malformed_message")
    assert instance.parent() == parent


def test_the_control_nobody_else_gets_there(instance: Instance, backend: Listener) -> None:
    """With no worker taken over, the same client is refused, and told why."""
    with TlsClient(instance.port, "localhost", versions=(0x303, 0x303)) as client:
        with pytest.raises(Exception, match="alert handshake failure"):
            client.handshake()
    with pytest.raises(BlockingIOError):
        backend.accept()
