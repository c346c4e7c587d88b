"""``titus-py reload --cut``: whose connections end, and whose do not."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from .client_authority import ClientAuthority, ClientCertificate
from .conftest import Serve
from .instance import TITUS_PY, Instance, Process, toml
from .peers import Listener, TlsClient, was_reset
from .test_forged_events import mouth


@pytest.fixture
def authority(tmp_path: Path) -> ClientAuthority:
    return ClientAuthority(tmp_path)


class Connected:
    """A client with a certificate, or none, that has heard its echo."""

    def __init__(self, instance: Instance, certificate: ClientCertificate | None) -> None:
        shown = None if certificate is None else (certificate.chain, certificate.key)
        self._client = TlsClient(instance.port, certificate=shown).handshake()
        self.name = "{}:{}".format(*self._client.socket.getsockname())
        assert self.echoes()

    def echoes(self) -> bool:
        self._client.send(b"x")
        return self._client.receive_exactly(1) == b"x"

    def was_reset(self) -> bool:
        return was_reset(self._client.socket)

    def close(self) -> None:
        self._client.socket.close()


def reload(instance: Instance, *options: str) -> "subprocess.CompletedProcess[str]":
    command = reload_command(instance, *options)
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def reload_command(instance: Instance, *options: str) -> list[str]:
    return [str(TITUS_PY), "reload", "--pid", str(instance.pid), *options]


def cut(instance: Instance) -> int:
    """How many connections it says that it has ended."""
    done = reload(instance, "--cut")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[-1]
    assert said.endswith(" ended")
    return int(said.split()[1])


@pytest.fixture
def clients(authority: ClientAuthority) -> dict[str, ClientCertificate]:
    return {name: authority.issue(name, dns=[f"{name}.example.org"]) for name in ("alice", "bob")}


def settings(authority: ClientAuthority, **others: Any) -> dict[str, Any]:
    """Of a virtual host; without others, they let in whoever has a certificate, or none."""
    return {
        "client_certificates": "optional",
        "client_ca": authority.file,
        "client_crl": others.get("client_crl") or authority.crl(),
        "client_allow": "all",
        **others,
    }


def _lines(vhost: dict[str, Any]) -> str:
    """As they are in a configuration's file."""
    return toml({"vhost": [vhost]}).partition("\n")[2].rstrip("\n")


@pytest.fixture
def connections() -> Iterator[list[Connected]]:
    connections: list[Connected] = []
    yield connections
    for connection in connections:
        connection.close()


def test_whom_it_ends(
    serve: Serve,
    echoing: Listener,
    authority: ClientAuthority,
    clients: dict[str, ClientCertificate],
    connections: list[Connected],
    tmp_path: Path,
) -> None:
    vhost = settings(authority)
    instance = serve(echoing.address, vhost=[vhost])
    file = instance.directory / "titus.toml"
    before, now = file.read_text(), _lines(vhost)
    assert now in before

    def change(**others: Any) -> None:
        file.write_text(before.replace(now, _lines(settings(authority, **others))))

    alice, bob = (Connected(instance, clients[name]) for name in ("alice", "bob"))
    nobody = Connected(instance, None)
    connections += [alice, bob, nobody]

    # Revoked: not by a mere reload.
    change(client_crl=authority.crl(clients["bob"]))
    assert reload(instance).returncode == 0
    assert bob.echoes()
    assert cut(instance) == 1
    assert bob.was_reset()
    assert instance.wait_for_event("connection_ended", client=bob.name)["end"] == (
        "no_longer_allowed"
    )
    assert alice.echoes()
    assert nobody.echoes()
    # Required now, and a shorter list.
    carol = Connected(instance, authority.issue("carol", dns=["carol.example.org"]))
    connections.append(carol)
    change(client_certificates="required", client_allow={"dns": ["carol.example.org"]})
    assert cut(instance) == 2
    assert alice.was_reset()
    assert nobody.was_reset()
    assert carol.echoes()
    # Another authority.
    other = ClientAuthority(tmp_path / "other", "other")
    change(client_ca=other.file, client_crl=other.crl())
    assert cut(instance) == 1
    assert carol.was_reset()
    cuts = instance.wait_for_events(3, "connections_cut")
    assert [event["count"] for event in cuts] == [1, 2, 1]


def test_among_more_virtual_hosts_than_an_order_names(
    serve: Serve,
    echoing: Listener,
    authority: ClientAuthority,
    clients: dict[str, ClientCertificate],
    connections: list[Connected],
) -> None:
    asking = settings(authority)
    others = [{**asking, "sni": [f"{number}.example.org"]} for number in range(200)]
    instance = serve(echoing.address, vhost=[*others, asking])
    alice, bob = (Connected(instance, clients[name]) for name in ("alice", "bob"))
    connections += [alice, bob]
    authority.crl(clients["alice"])
    assert cut(instance) == 1
    assert alice.was_reset()
    assert bob.echoes()


def test_after_another_program(
    serve: Serve,
    echoing: Listener,
    authority: ClientAuthority,
    clients: dict[str, ClientCertificate],
    connections: list[Connected],
) -> None:
    """The connections of the program before are known, and its parent can be started anew."""
    instance = serve(echoing.address, vhost=[settings(authority)])
    before, after = (Connected(instance, clients[name]) for name in ("alice", "bob"))
    connections += [before, after]
    done = reload(instance, "--program")
    assert done.returncode == 0, done.stderr
    assert before.echoes()
    authority.crl(clients["alice"])
    assert cut(instance) == 1
    assert before.was_reset()
    assert after.echoes()


def test_who_shakes_hands_connects_again(
    serve: Serve,
    echoing: Listener,
    authority: ClientAuthority,
    clients: dict[str, ClientCertificate],
    connections: list[Connected],
) -> None:
    instance = serve(echoing.address, vhost=[settings(authority)])
    with TlsClient(instance.port) as client:
        client.socket.sendall(client.first_flight())
        name = "{}:{}".format(*client.socket.getsockname())
        instance.wait_for_event("connection_begun", client=name)
        assert cut(instance) == 0
        assert was_reset(client.socket)
    connections.append(Connected(instance, clients["alice"]))


def cut_while_it_says(instance: Instance, parent: Process, said: object) -> tuple[int, str, str]:
    """Cut while code in this parent says this, and its own code nothing; how that went."""
    octets = json.dumps(said).encode()
    parent.kill(signal.SIGSTOP)
    with (
        mouth(parent, instance.supervisor()) as ours,
        subprocess.Popen(
            reload_command(instance, "--cut"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as command,
    ):
        # It is heard once the cut has begun.
        while command.poll() is None:
            with suppress(OSError):
                ours.send(octets)
            time.sleep(0.05)
        return (command.returncode, *command.communicate())


def test_a_parent_that_lies_keeps_no_other_ones_clients(
    serve: Serve,
    echoing: Listener,
    authority: ClientAuthority,
    clients: dict[str, ClientCertificate],
    connections: list[Connected],
) -> None:
    instance = serve(echoing.address, vhost=[settings(authority)])
    instance.expected_alarms |= {"unintelligible", "parent_died"}
    liar, its_own = instance.parent(), Connected(instance, clients["alice"])
    assert reload(instance).returncode == 0
    alice, bob = (Connected(instance, clients[name]) for name in ("alice", "bob"))
    connections += [its_own, alice, bob]
    # It has lost what it said of its client, or says so.
    authority.crl(clients["bob"])
    code, ended, problem = cut_while_it_says(instance, liar, {"event": "claims_told", "count": 1})
    liar.kill(signal.SIGCONT)
    assert (code, ended.splitlines()[-1]) == (1, "titus-py: 1 connection ended")
    assert "generation 1 has counted 1 connections, and said who 0 of them are" in problem
    assert bob.was_reset()
    assert alice.echoes()
    assert its_own.echoes()
    # It claims more than it may have: without end, if nobody stopped it.
    authority.crl(*clients.values())
    code, ended, problem = cut_while_it_says(
        instance, liar, {"event": "claims", "claims": [[1, 0, None]] * 400}
    )
    assert (code, ended.splitlines()[-1], problem) == (0, "titus-py: 1 connection ended", "")
    assert instance.wait_for_event("unintelligible")["pid"] == liar.pid
    assert alice.was_reset()
    assert its_own.was_reset()


def test_hosts_that_ask_for_nothing_are_left_alone(
    serve: Serve, echoing: Listener, connections: list[Connected]
) -> None:
    instance = serve(echoing.address)
    connection = Connected(instance, None)
    connections.append(connection)
    assert cut(instance) == 0
    assert connection.echoes()


def test_a_mistake_ends_nobody(
    serve: Serve,
    echoing: Listener,
    authority: ClientAuthority,
    clients: dict[str, ClientCertificate],
    connections: list[Connected],
) -> None:
    instance = serve(echoing.address, vhost=[settings(authority)])
    connection = Connected(instance, clients["alice"])
    connections.append(connection)
    authority.crl(clients["alice"]).write_text("no list")
    done = reload(instance, "--cut")
    assert done.returncode == 1
    assert "client_crl" in done.stderr
    assert connection.echoes()


def test_it_goes_with_no_other_program(serve: Serve, echoing: Listener) -> None:
    """An earlier program's parents might not know what they are asked."""
    done = reload(serve(echoing.address), "--cut", "--program")
    assert done.returncode == 2
    assert "not allowed with" in done.stderr
