"""What a worker that was taken over before its handshake can do without a certificate.

Who a client is, is its worker's word: docs/threat-model.md says so, and this shows it.
"""

import random
from collections.abc import Iterator

import pytest
from integration.certificates import Certificate
from integration.client_authority import ClientAuthority
from integration.instance import Instance
from integration.peers import TIMEOUT, Listener, TlsClient, was_reset

from titus_py.between.client_identity import Identity

from .harness import infected, take_over
from .infected_fork_server import IDENTITY


@pytest.fixture(scope="module")
def backend() -> Iterator[Listener]:
    with Listener.tcp() as listener:
        yield listener


@pytest.fixture(scope="module")
def instance(
    certificate: Certificate, backend: Listener, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Instance]:
    directory = tmp_path_factory.mktemp("instance")
    authority = ClientAuthority(directory / "clients")
    vhost = {
        "client_certificates": "required",
        "client_ca": authority.file,
        "client_allow": {"cn": ["alice"]},
    }
    known = {
        "sni": ["known.test"],
        "client_certificates": "required",
        "client": [{"name": "web-1", "spki": [f"sha256:{'11' * 32}"], "connections": 1}],
    }
    with infected(directory, certificate, backend.address, vhost=[known, vhost]) as instance:
        yield instance


def nobody_came(backend: Listener) -> bool:
    backend.socket.setblocking(False)
    try:
        backend.accept().close()
    except BlockingIOError:
        return True
    finally:
        backend.socket.settimeout(TIMEOUT)
    return False


def test_without_an_identity_it_reaches_nothing(instance: Instance, backend: Listener) -> None:
    """Our code always makes one out: who does not is not our code."""
    result = take_over(instance, "h", "burst", "parent", "440001ff")
    [alarm] = [event for event in result.alarms if event["event"] == "unexpected_message"]
    assert alarm["attempted"] == "Dial(vhost=1, protocol=None, facts=None)"
    assert nobody_came(backend)


@pytest.mark.parametrize("octets", ["49", "49" + "00" * 30, "49" + "ff" * 30])
def test_no_identity_is_an_alarm(instance: Instance, backend: Listener, octets: str) -> None:
    result = take_over(instance, "h", "burst", "parent", octets, "440001ff")
    assert [event["event"] for event in result.alarms] == ["malformed_message"]
    assert nobody_came(backend)


def test_an_identity_that_is_made_up_is_believed(instance: Instance, backend: Listener) -> None:
    """The parent cannot tell it from a true one: this is what the threat model states."""
    since = len(instance.events())
    with TlsClient(instance.port, "h.impersonate.alice.attack.test") as client:
        client.socket.sendall(client.first_flight())
        name = "{}:{}".format(*client.socket.getsockname())
        backend.accept().close()
    begun = instance.wait_for_event("connection_begun", since=since, client=name)
    assert not instance.events_named("unexpected_message", connection=begun["connection"])


def test_a_known_client_that_is_claimed_to_be_there_is_believed(
    instance: Instance, backend: Listener
) -> None:
    """It has that client's backend, and uses up what that client may have."""
    with TlsClient(instance.port, "h.claim.0.0.attack.test") as client:
        client.socket.sendall(client.first_flight())
        backend.accept().close()
        with TlsClient(instance.port, "h.claim.0.0.attack.test") as second:
            second.socket.sendall(second.first_flight())
            ended = instance.wait_for_event("handshake_failed", client=second.name)
        assert (ended["end"], ended["client_name"]) == ("client_connections", "web-1")
    assert nobody_came(backend)


def test_one_that_there_is_not_is_an_alarm(instance: Instance, backend: Listener) -> None:
    """Nor is a known client one of a virtual host that knows none."""
    for vhost, known in ((0, 1), (0, 4000), (1, 0)):
        result = take_over(instance, "h", "claim", str(vhost), str(known))
        assert [event["event"] for event in result.alarms] == ["unexpected_message"]
    assert nobody_came(backend)


def test_twice_is_an_alarm(instance: Instance) -> None:
    result = take_over(instance, "h", "impersonate", "alice", "bob")
    assert [event["event"] for event in result.alarms] == ["unexpected_message"]
    assert "bob" in result.alarms[0]["attempted"]


def test_fuzzing(instance: Instance, backend: Listener) -> None:
    """Whatever a worker makes up to be an identity: only its own connection ends."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    assert Identity.decode(IDENTITY).facts.cn == ("alice",)
    parent = instance.parent()
    since = len(instance.events())
    names = set()
    for number in range(10):
        with TlsClient(instance.port, f"h.fuzz.parent.{seed + number}.100.attack.test") as client:
            client.socket.sendall(client.first_flight())
            names.add("{}:{}".format(*client.socket.getsockname()))
            was_reset(client.socket)
    ends = [instance.wait_for_event("handshake_failed", since=since, client=name) for name in names]
    # A worker may have said its last word before the parent has heard the first.
    alarms = {"malformed_message", "unexpected_message"}
    assert {event["end"] for event in ends} <= alarms | {"handshake_failed"}
    assert any(event["event"] == "malformed_message" for event in instance.events()[since:])
    assert instance.parent() == parent
    while not nobody_came(backend):
        pass  # one that was made up right


def test_the_control_nobody_else_gets_there(instance: Instance, backend: Listener) -> None:
    """With no worker taken over, the same client is refused, and told why."""
    with TlsClient(instance.port, "localhost", versions=(0x303, 0x303)) as client:
        with pytest.raises(Exception, match="alert handshake failure"):
            client.handshake()
    assert nobody_came(backend)
