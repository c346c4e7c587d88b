"""PostgreSQL, whose clients and servers first agree to begin TLS: psql, and a server of Debian's.

The server has TLS by TCP, for whoever has a certificate, and none by its unix socket.
"""

import os
import pwd
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.x509 import load_pem_x509_certificate

from titus_py.commands.keys_pin import pin
from titus_py.worker.certificate_facts import public_key_id

from .certificates import Certificate
from .client_authority import ClientAuthority
from .conftest import Certificates, Serve
from .instance import Instance, eventually, free_port
from .peers import (
    Listener,
    TlsClient,
    connect,
    receive_all,
    receive_exactly,
    reset,
    resets,
    served_by,
    was_reset,
)
from .tls_server import tls_server

PROGRAMS = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"))), Path("/nowhere"))
SSL_REQUEST = bytes.fromhex("0000000804d2162f")
GSSENC_REQUEST = bytes.fromhex("0000000804d21630")
CANCEL_REQUEST = bytes.fromhex("0000001004d2162e") + bytes(8)


class Postgresql(NamedTuple):
    """Where it listens: with TLS, and without."""

    address: str
    path: Path


@pytest.fixture(scope="module")
def site(certificates: Certificates) -> Certificate:
    return certificates("P-256", "localhost")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> ClientAuthority:
    return ClientAuthority(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def postgresql(site: Certificate, authority: ClientAuthority) -> Iterator[Postgresql]:
    directory, port = Path(tempfile.mkdtemp()), free_port()
    user = pwd.getpwnam("postgres")
    identity: dict[str, Any] = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    sources = {"crt": site.certificate, "key": site.key, "ca": authority.file}
    for name, source in sources.items():
        (directory / name).write_bytes(source.read_bytes())
        (directory / name).chmod(0o600)
    for path in (directory, *directory.iterdir()):
        os.chown(path, user.pw_uid, user.pw_gid)
    data = directory / "data"
    words = ["--auth=trust", "--no-sync", "-U", "app"]
    null = subprocess.DEVNULL
    try:
        subprocess.run([PROGRAMS / "initdb", *words, data], stdout=null, check=True, **identity)
        (data / "pg_hba.conf").write_text("local all all trust\nhostssl all all all cert\n")
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": port,
            "unix_socket_directories": directory,
            "fsync": "off",
            "ssl": "on",
            "ssl_cert_file": directory / "crt",
            "ssl_key_file": directory / "key",
            "ssl_ca_file": directory / "ca",
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [PROGRAMS / "postgres", "-D", data, *options]
        with subprocess.Popen(command, stdout=null, stderr=null, **identity) as process:
            ready = [PROGRAMS / "pg_isready", "-q", "-h", directory, "-p", str(port)]
            eventually(lambda: not subprocess.run(ready, check=False).returncode, "ready")
            yield Postgresql(f"127.0.0.1:{port}", directory / f".s.PGSQL.{port}")
            process.terminate()
    finally:
        shutil.rmtree(directory)


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


class Ways(NamedTuple):
    """An instance, and the ports of its two ways to PostgreSQL, and of one through both."""

    instance: Instance
    tunnel: int
    listener: int
    both: int
    #: Of the tunnel on a unix socket.
    directory: Path


@pytest.fixture(scope="module")
def ways(
    serve_all: Serve, postgresql: Postgresql, site: Certificate, authority: ClientAuthority
) -> Ways:
    own = authority.issue("app")
    tunnel, listener, both = (f"127.0.0.1:{free_port()}" for _ in range(3))
    directory = postgresql.path.parent
    common = {"ca": site.authority, "server_name": "localhost", "starttls": "postgresql"}
    instance = serve_all(
        listen=[{"address": listener, "starttls": "postgresql"}],
        vhost=[
            {
                "backend": f"unix:{postgresql.path}",
                "certificate": site.certificate,
                "key": site.key,
            }
        ],
        tunnel=[
            {
                "listen": tunnel,
                "connect": postgresql.address,
                "certificate": own.chain,
                "key": own.key,
                **common,
            },
            {"listen": both, "connect": listener, **common},
            {"listen": f"unix:{directory}/.s.PGSQL.5432", "connect": listener, **common},
        ],
    )
    return Ways(instance, *map(port_of, (tunnel, listener, both)), directory)


def psql(port: int, query: str, **settings: object) -> "subprocess.CompletedProcess[str]":
    where = {"host": "localhost", "hostaddr": "127.0.0.1", "port": port, "user": "app"}
    words = " ".join(f"{key}={value}" for key, value in (where | settings).items())
    return subprocess.run(
        ["psql", "-Atc", query, f"{words} dbname=postgres"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


BY_TLS = "select ssl from pg_stat_ssl where pid = pg_backend_pid()"


def test_through_a_tunnel_to_one_that_has_tls(ways: Ways) -> None:
    """With psql's settings as they are: it asks the tunnel for TLS, and does without.

    The server knows it by the certificate that the tunnel shows. By a password it would not:
    psql finds SCRAM's binding to a TLS connection that it does not have.
    """
    done = psql(ways.tunnel, BY_TLS)
    assert done.stdout == "t\n", done.stderr + ways.instance.log()[-3000:]
    rows = psql(ways.tunnel, "select generate_series(1, 50000)", sslmode="disable").stdout
    assert rows == "".join(f"{number}\n" for number in range(1, 50_001))
    refused = psql(ways.tunnel, BY_TLS, sslmode="require")
    assert "server does not support SSL, but SSL was required" in refused.stderr


def test_through_a_listener_to_one_that_has_none(ways: Ways, site: Certificate) -> None:
    verified = {"sslmode": "verify-full", "sslrootcert": site.authority}
    done = psql(ways.listener, BY_TLS, **verified)
    assert (done.stdout, done.stderr) == ("f\n", "")
    rows = psql(ways.listener, "select generate_series(1, 50000)", **verified).stdout
    assert rows == "".join(f"{number}\n" for number in range(1, 50_001))
    # Who does not ask for TLS gets nothing.
    refused = psql(ways.listener, BY_TLS, sslmode="disable")
    assert refused.returncode != 0
    assert ways.instance.wait_for_event("handshake_failed", end="not_tls")


def test_through_both(ways: Ways) -> None:
    assert psql(ways.both, BY_TLS).stdout == "f\n"


def test_by_a_unix_socket(ways: Ways) -> None:
    """Where libpq looks for one, in a directory."""
    query = "select generate_series(1, 50000)"
    command = ["psql", "-Atc", query, f"host={ways.directory} user=app dbname=postgres"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout == "".join(f"{number}\n" for number in range(1, 50_001)), done.stderr
    tunnel = f"unix:{ways.directory}/.s.PGSQL.5432"
    ended = ways.instance.wait_for_event("connection_ended", tunnel=tunnel)
    assert ended["client"].startswith(f"unix:uid={os.getuid()},pid=")


def test_the_pin_of_one(
    postgresql: Postgresql, site: Certificate, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is asked for by hand, the first time."""
    assert pin(postgresql.address, None, 30, "postgresql") == 0
    shown = load_pem_x509_certificate(site.certificate.read_bytes())
    assert capsys.readouterr().out == f"sha256:{public_key_id(shown).hex()}\n"


def test_tls_may_begin_at_once(ways: Ways) -> None:
    """As PostgreSQL 17 and others have it."""
    with TlsClient(ways.listener) as client:
        client.handshake()
        assert ways.instance.runs()


@pytest.mark.parametrize("pieces", [[8], [1, 7], [7, 1], [1] * 8], ids=str)
def test_a_request_may_come_in_pieces(ways: Ways, pieces: list[int]) -> None:
    """And after one for Kerberos, which is not to be had."""
    with connect(ways.listener) as client:
        for request, answer in ((GSSENC_REQUEST, b"N"), (SSL_REQUEST, b"S")):
            rest = request
            for length in pieces:
                client.sendall(rest[:length])
                rest = rest[length:]
            assert receive_exactly(client, 1) == answer
        with TlsClient(ways.listener, source=client) as tls:
            tls.handshake()


@pytest.mark.parametrize("octets", [CANCEL_REQUEST, b"GET / HTTP/1.1\r\n\r\n", SSL_REQUEST[:5]])
def test_what_else_comes_first_gets_nothing(ways: Ways, octets: bytes) -> None:
    with connect(ways.listener) as client:
        client.sendall(octets)
        client.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            assert not receive_all(client).startswith(b"S")
    with TlsClient(ways.listener) as another:
        another.handshake()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(b"N", "the server has no TLS"), (b"E", "no server of PostgreSQL: it says b'E'")],
)
def test_a_server_without_tls_gets_nothing(
    serve: Serve, site: Certificate, answer: bytes, reason: str
) -> None:
    """Nobody is talked out of TLS: what was asked in the clear, anybody may have answered."""
    asked: list[bytes] = []

    def refuse(connection: socket.socket) -> None:
        asked.append(connection.recv(8, socket.MSG_WAITALL))
        connection.sendall(answer)
        asked.append(connection.recv(65536))

    listen = f"127.0.0.1:{free_port()}"
    with Listener.tcp() as server, served_by(server, refuse):
        table = {
            "listen": listen,
            "connect": server.address,
            "ca": site.authority,
            "server_name": "localhost",
            "starttls": "postgresql",
        }
        instance = serve(listen=[], vhost=[], tunnel=[table])
        assert resets(port_of(listen), b"a password, perhaps")
        event = instance.wait_for_event("tunnel_failed", tunnel=listen)
        eventually(lambda: len(asked) == 2, "the server has heard all")
    assert (event["end"], event["detail"]) == ("starttls_refused", reason)
    assert asked == [SSL_REQUEST, b""]


def test_a_server_that_leaves_before_a_word_was_said(serve: Serve, site: Certificate) -> None:
    """No alarm: the network does what it likes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(site.certificate, site.key)

    def agree(connection: socket.socket) -> None:
        connection.sendall(b"S" if connection.recv(8, socket.MSG_WAITALL) else b"")

    def leave(connection: ssl.SSLSocket) -> None:
        reset(socket.socket(fileno=connection.detach()))

    listen = f"127.0.0.1:{free_port()}"
    with tls_server(context, leave, agree) as address:
        table = {"listen": listen, "connect": address, "ca": site.authority}
        instance = serve(
            listen=[],
            vhost=[],
            tunnel=[{**table, "server_name": "localhost", "starttls": "postgresql"}],
        )
        with connect(port_of(listen)) as client:
            name = "{}:{}".format(*client.getsockname())
            instance.wait_for_event("connection_begun", client=name)
            time.sleep(0.1)  # for the reset to come first
            client.sendall(b"a startup message")
            assert was_reset(client)
        event = instance.wait_for_event("connection_ended", client=name)
    assert (event["end"], event["level"]) == ("server_reset", "error")
