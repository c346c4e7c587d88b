"""Tunnels that show a certificate: keyd signs for it, as a client."""

import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.x509 import load_pem_x509_certificates

from .client_authority import ClientAuthority, spki_of
from .conftest import Certificates, Serve
from .instance import TITUS_PY, UIDS, Instance, eventually, free_port, toml
from .peers import Listener, connect, receive_all, receive_exactly, resets


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> ClientAuthority:
    return ClientAuthority(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def kinds(certificates: Certificates) -> dict[str, Any]:
    """A key of each kind that keyd has, each in a certificate of its own."""
    return {kind: certificates(kind, f"{kind}.test") for kind in ("RSA-2048", "P-384", "Ed25519")}


def port_of(table: dict[str, Any]) -> int:
    return int(table["listen"].rpartition(":")[2])


@pytest.fixture(scope="module")
def at() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def tables(
    authority: ClientAuthority, kinds: dict[str, Any], certificates: Certificates, at: str
) -> dict[str, dict[str, Any]]:
    """Tunnels to our own virtual host, by what they show to it."""
    known, stranger = authority.issue(self_signed=True), authority.issue(self_signed=True)
    shown: dict[str, dict[str, Any]] = {
        "nothing": {},
        "P-256": {"certificate": known.chain, "key": known.key},
        "a stranger's": {"certificate": stranger.chain, "key": stranger.key},
    }
    for kind, files in kinds.items():
        shown[kind] = {"certificate": files.certificate, "key": files.key}
    site = certificates("P-256", "site.test")
    common = {"connect": at, "ca": site.authority, "server_name": "site.test"}
    return {
        kind: {"listen": f"127.0.0.1:{free_port()}", **common, **files}
        for kind, files in shown.items()
    }


def pin_of(certificate: Path) -> str:
    return spki_of(load_pem_x509_certificates(certificate.read_bytes())[0])


@pytest.fixture(scope="module")
def instance(
    serve_all: Serve,
    certificates: Certificates,
    echoing: Listener,
    at: str,
    tables: dict[str, dict[str, Any]],
) -> Instance:
    """Both ends: a virtual host that knows some keys, and tunnels to it."""
    site = certificates("P-256", "site.test")
    allowed = [
        pin_of(table["certificate"])
        for kind, table in tables.items()
        if kind not in ("nothing", "a stranger's")
    ]
    vhost = {
        "backend": echoing.address,
        "certificate": site.certificate,
        "key": site.key,
        "client_certificates": "required",
        "client_allow": {"spki": allowed},
    }
    return serve_all(listen=[{"address": at}], vhost=[vhost], tunnel=list(tables.values()))


@pytest.mark.parametrize("kind", ["P-256", "RSA-2048", "P-384", "Ed25519"])
def test_a_known_key_is_let_in(
    instance: Instance, tables: dict[str, dict[str, Any]], kind: str
) -> None:
    before = instance.events_named("keyd_refused")
    with connect(port_of(tables[kind])) as client:
        client.sendall(b"in and out")
        assert receive_exactly(client, 10) == b"in and out"
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b""
        name = "{}:{}".format(*client.getsockname())
    event = instance.wait_for_event("connection_ended", client=name)
    assert (event["end"], event["tls_version"]) == ("clean", "TLSv1.3")
    pin = pin_of(tables[kind]["certificate"])
    shown = instance.wait_for_event("connection_ended", certificate_spki=pin)
    assert (shown["end"], shown.get("tunnel")) == ("clean", None)
    assert instance.events_named("keyd_refused") == before


@pytest.mark.parametrize("kind", ["nothing", "a stranger's"])
def test_others_are_turned_down_by_the_server(
    instance: Instance, tables: dict[str, dict[str, Any]], kind: str
) -> None:
    """In TLS 1.3, when the tunnel's own handshake is done. The log is not filled by it either."""
    table = tables[kind]
    attempts = 5
    for _ in range(attempts):
        assert resets(port_of(table))

    def counted() -> int:
        ends = instance.events_named("connection_ended", tunnel=table["listen"])
        assert all(one["level"] == "error" for one in ends)
        return sum(one.get("count", 1) for one in ends)

    eventually(lambda: counted() == attempts, "every one of them is accounted for")
    (first, *_) = instance.events_named("connection_ended", tunnel=table["listen"])
    assert first["end"] == "server_protocol_error"
    wanted = "certificate required" if kind == "nothing" else "bad certificate"
    assert wanted in first["detail"]


def test_a_server_of_tls_1_2_gets_no_signature(
    serve: Serve, authority: ClientAuthority, tmp_path: Path
) -> None:
    """What a client signs there has no form that keyd could check."""
    server, own = authority.issue(self_signed=True), authority.issue(self_signed=True)
    port = free_port()
    table = {
        "listen": f"127.0.0.1:{free_port()}",
        "connect": f"127.0.0.1:{port}",
        "pins": [server.spki],
        "certificate": own.chain,
        "key": own.key,
    }
    instance = serve(listen=[], vhost=[], tunnel=[table])
    command = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-tls1_2", "-Verify", "1"]
    command += ["-cert", str(server.chain), "-key", str(server.key), "-quiet"]
    log = tmp_path / "s_server"
    with (
        log.open("wb") as file,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file) as process,
    ):
        eventually(lambda: _listens(port), "s_server listens")
        assert resets(port_of(table))
        event = instance.wait_for_event("tunnel_failed", tunnel=table["listen"])
        process.terminate()
    assert "protocol version" in event["detail"]


def _listens(port: int) -> bool:
    return (
        subprocess.run(["ss", "-Hltn", f"sport = :{port}"], check=True, capture_output=True).stdout
        != b""
    )


def test_mistakes_that_show_with_the_files(certificates: Certificates, tmp_path: Path) -> None:
    site = certificates("P-256", "site.test")
    common = {"connect": "127.0.0.1:5433", "ca": site.authority, "server_name": "site.test"}
    files = [
        {"certificate": site.certificate, "key": site.key},
        _of_a_weak_authority(tmp_path),
    ]
    ports = 5432, 5434
    path = tmp_path / "titus.toml"
    path.write_text(
        toml(
            {
                "listen": [{"address": "127.0.0.1:8443"}],
                "vhost": [
                    {
                        "backend": "127.0.0.1:80",
                        "certificate": site.certificate,
                        "key": site.key,
                    }
                ],
                "tunnel": [
                    {"listen": f"127.0.0.1:{port}", **common, **one}
                    for port, one in zip(ports, files, strict=True)
                ],
            }
        )
    )
    done = subprocess.run(
        [TITUS_PY, "check", "--config", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    for port, reason in zip(
        ports,
        ("is for a key that signs as a server, too, for vhost", "its key is too short"),
        strict=True,
    ):
        found = re.findall(rf'tunnel "127\.0\.0\.1:{port}": certificate: (.*)', done.stderr)
        assert any(reason in said for said in found), done.stderr


def test_a_pin_of_ones_own_is_doubtful(tmp_path: Path, authority: ClientAuthority) -> None:
    own, servers = (authority.issue(self_signed=True) for _ in range(2))
    tunnels = [
        {
            "listen": f"127.0.0.1:{port}",
            "connect": "127.0.0.1:443",
            "pins": [pin_of(one.chain) for one in pinned],
            "certificate": own.chain,
            "key": own.key,
        }
        for port, pinned in ((5432, [servers]), (5434, [servers, own]))
    ]
    uids = UIDS.take()
    tables = {
        "worker": {"uids": f"{uids[0]}-{uids[-2]}"},
        "keyd": {"user": str(uids[-1])},
        "tunnel": tunnels,
    }
    path = tmp_path / "titus.toml"
    path.write_text(toml(tables))
    done = subprocess.run(
        [TITUS_PY, "check", "--config", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = re.findall(r'tunnel "127\.0\.0\.1:(\d+)": pins: (.*)', done.stdout + done.stderr)
    ((port, reason),) = said
    assert port == "5434"
    assert f"one is of {own.chain}, which this tunnel shows itself" in reason


def _of_a_weak_authority(directory: Path) -> dict[str, Path]:
    """Our own key is good; the chain that goes with it is not for today's OpenSSL."""
    files = {"certificate": directory / "own.crt", "key": directory / "own.key"}
    ca, leaf = directory / "ca", directory / "leaf.crt"
    for command in (
        f"req -newkey rsa:1024 -nodes -x509 -days 90 -subj /CN=ca -keyout {ca}.key -out {ca}.crt",
        "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=own "
        f"-keyout {files['key']} -out {directory}/csr",
        f"x509 -req -days 90 -in {directory}/csr -CA {ca}.crt -CAkey {ca}.key -CAcreateserial "
        f"-out {leaf}",
    ):
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    files["certificate"].write_bytes(leaf.read_bytes() + Path(f"{ca}.crt").read_bytes())
    return files
