"""[[vhost.client]]: what each client may reach, how much, and how fast."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any, cast

import pytest
from OpenSSL import SSL

from titus_py.supervisor.control_client import ask

from .client_authority import ClientAuthority, ClientCertificate
from .conftest import Serve
from .instance import TITUS_PY, Instance, eventually, toml
from .peers import Listener, TlsClient, Truncated, served_by, was_reset


def naming(name: bytes) -> Any:
    """A backend that says its name, and then stays until its client leaves."""

    def handle(connection: Any) -> None:
        with suppress(OSError):
            connection.sendall(name)
            while connection.recv(65536):
                pass

    return handle


@pytest.fixture(scope="module")
def backends() -> Iterator[dict[str, Listener]]:
    with ExitStack() as opened:
        yield {
            name: opened.enter_context(
                served_by(opened.enter_context(Listener.tcp()), naming(name.encode()))
            )
            for name in ("common", "own")
        }


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> ClientAuthority:
    return ClientAuthority(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def clients(authority: ClientAuthority) -> dict[str, ClientCertificate]:
    """Self-signed, but for ``by-name``, which only the authority vouches for."""
    made = {
        name: authority.issue(name, dns=(), self_signed=True)
        for name in ("new", "old", "few", "slow", "stranger")
    }
    return made | {"by-name": authority.issue("x", dns=("host.example.org",))}


def tables(
    clients: dict[str, ClientCertificate], backends: dict[str, Listener]
) -> list[dict[str, Any]]:
    return [
        {
            "name": "rotating",
            "spki": [clients["old"].spki, clients["new"].spki],
            "backend": backends["own"].address,
        },
        {"name": "few", "spki": [clients["few"].spki], "connections": 2},
        {"name": "slow", "spki": [clients["slow"].spki], "rate": "3/h"},
    ]


@pytest.fixture(scope="module")
def instance(
    serve_all: Serve,
    clients: dict[str, ClientCertificate],
    backends: dict[str, Listener],
    authority: ClientAuthority,
) -> Instance:
    known = {"client_certificates": "required", "client": tables(clients, backends)}
    named = {
        "client_certificates": "optional",
        "client_ca": authority.file,
        "client": [{"name": "hosts", "dns": ["*.example.org"], "backend": backends["own"].address}],
    }
    vhosts = [{"sni": ["localhost"], **known}, {"sni": ["named.test"], **named}]
    return serve_all(backends["common"].address, vhost=vhosts)


class Client:
    """One that has heard the name of its backend, or was refused."""

    def __init__(
        self, instance: Instance, certificate: ClientCertificate | None, name: str = "localhost"
    ) -> None:
        shown = None if certificate is None else (certificate.chain, certificate.key)
        self._client = TlsClient(instance.port, name, certificate=shown)
        self.name = self._client.name
        self.heard = b""
        with suppress(SSL.Error, Truncated, ConnectionResetError):
            self.heard = self._client.handshake().receive()

    def was_reset(self) -> bool:
        return was_reset(self._client.socket)

    def close(self) -> None:
        self._client.socket.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_each_reaches_its_own_backend_with_either_of_two_keys(
    instance: Instance, clients: dict[str, ClientCertificate]
) -> None:
    for one in ("old", "new"):
        with Client(instance, clients[one]) as client:
            assert client.heard == b"own"
        ended = instance.wait_for_event("connection_ended", client=client.name)
        assert (ended["client_name"], ended["certificate_spki"]) == ("rotating", clients[one].spki)
    eventually(lambda: not live(instance, "few"), "no other test's")
    with Client(instance, clients["few"]) as client:
        assert client.heard == b"common"
    assert instance.wait_for_event("connection_ended", client=client.name)["client_name"] == "few"


def test_by_name_where_an_authority_vouches(
    instance: Instance, clients: dict[str, ClientCertificate]
) -> None:
    with Client(instance, clients["by-name"], "named.test") as client:
        assert client.heard == b"own"
    ended = instance.wait_for_event("connection_ended", client=client.name)
    assert ended["client_name"] == "hosts"
    # Optional: who shows none is nobody, and no client's limits or backend are for it.
    with Client(instance, None, "named.test") as client:
        assert client.heard == b"common"
    assert "client_name" not in instance.wait_for_event("connection_ended", client=client.name)


def test_whoever_is_none_of_them_is_refused(
    instance: Instance, clients: dict[str, ClientCertificate]
) -> None:
    done = subprocess.run(
        [
            "openssl", "s_client", "-connect", f"127.0.0.1:{instance.port}",
            "-servername", "localhost", "-quiet", *clients["stranger"].options,
        ],
        input=b"hello\n",
        capture_output=True,
        timeout=240,
        check=False,
    )  # fmt: skip
    assert (done.stdout, b"SSL alert number 42" in done.stderr) == (b"", True)
    refused = instance.wait_for_event("handshake_failed", certificate_spki=clients["stranger"].spki)
    assert (refused["end"], refused["detail"]) == ("client_certificate", "unknown_key")
    assert "client_name" not in refused


def counted(instance: Instance, what: str) -> dict[str, int]:
    counts = ask(instance.pid, {"do": "status"}, 60)["counts"]
    return cast(dict[str, int], counts[what])


def live(instance: Instance, name: str) -> int:
    """How many connections the status has for a client."""
    vhosts = ask(instance.pid, {"do": "status"}, 60)["vhosts"]
    (found,) = (one["live"] for vhost in vhosts for one in vhost["clients"] if one["name"] == name)
    return cast(int, found)


def test_no_more_than_so_many_at_once(
    instance: Instance, clients: dict[str, ClientCertificate]
) -> None:
    eventually(lambda: not live(instance, "few"), "no other test's")
    two = [Client(instance, clients["few"]) for _ in range(2)]
    assert [client.heard for client in two] == [b"common"] * 2
    eventually(lambda: live(instance, "few") == 2, "both are known")
    with Client(instance, clients["few"]) as third:
        assert third.heard == b""
    ended = instance.wait_for_event("connection_ended", client=third.name)
    assert (ended["end"], ended["client_name"]) == ("client_connections", "few")
    limited = instance.wait_for_event("limited", limit="client_connections")
    assert (limited["client_name"], limited["count"]) == ("few", 1)
    assert limited["last_client"] == "127.0.0.1"
    # Others have theirs, and so has it once one of its two has ended.
    with Client(instance, clients["old"]) as other:
        assert other.heard == b"own"
    two[0].close()
    instance.wait_for_event("connection_ended", client=two[0].name)
    assert live(instance, "few") == 1
    with Client(instance, clients["few"]) as third:
        assert third.heard == b"common"
    two[1].close()
    assert counted(instance, "clients_too_many") == {"few": 1}


def test_no_faster_than_so_many(instance: Instance, clients: dict[str, ClientCertificate]) -> None:
    heard = []
    for _ in range(5):
        with Client(instance, clients["slow"]) as client:
            heard.append(client.heard)
    assert heard == [b"common"] * 3 + [b""] * 2
    ended = instance.wait_for_event("connection_ended", client=client.name)
    assert (ended["end"], ended["client_name"]) == ("client_rate", "slow")
    eventually(lambda: counted(instance, "clients_too_fast") == {"slow": 2}, "both are counted")
    eventually(lambda: not live(instance, "slow"), "the others have ended")
    shown = subprocess.run(
        [TITUS_PY, "status", f"--pid={instance.pid}"], capture_output=True, text=True, check=True
    ).stdout
    assert "client slow" in shown
    assert "refused: 2 too fast" in shown
    vhost = ask(instance.pid, {"do": "status"}, 60)["vhosts"][0]
    assert vhost["clients"][2] == {
        "name": "slow",
        "backend": "",
        "live": 0,
        "connections": None,
        "rate": "3/h",
    }


def test_a_reload_that_takes_something_away_cuts(
    serve: Serve, clients: dict[str, ClientCertificate], backends: dict[str, Listener]
) -> None:
    """A key that is no longer listed; a backend that is no longer its own. And nobody else."""
    known = tables(clients, backends)
    vhost = {"client_certificates": "required", "client": known}
    instance = serve(backends["common"].address, vhost=[vhost])
    old, new, few = (Client(instance, clients[name]) for name in ("old", "new", "few"))
    slow = Client(instance, clients["slow"])
    file = instance.directory / "titus.toml"

    def change(of: int, **settings: Any) -> None:
        text = file.read_text()
        before = toml({"vhost.client": [known[of]]}).strip()
        assert before in text
        after = toml({"vhost.client": [known[of] | settings]}).strip()
        file.write_text(text.replace(before, after))

    try:
        change(0, spki=[clients["new"].spki])
        change(1, backend=backends["own"].address)
        change(2, connections=1)
        command = [TITUS_PY, "reload", f"--pid={instance.pid}", "--cut"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "2 connections ended" in done.stdout
        for client, name in ((old, "rotating"), (few, "few")):
            assert client.was_reset()
            ended = instance.wait_for_event("connection_ended", client=client.name)
            assert (ended["end"], ended["client_name"]) == ("no_longer_allowed", name)
    finally:
        for client in (old, new, few, slow):
            client.close()
    for client in (new, slow):
        ended = instance.wait_for_event("connection_ended", client=client.name)
        assert ended["end"] != "no_longer_allowed"
