"""The examples of two hosts, with the programs that they are for."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from titus_py.audit.throwaway_authority import ThrowawayAuthority

from .conftest import Serve
from .hosts import EXAMPLES, Network, network, serve_example
from .instance import TITUS_PY, UIDS, eventually
from .peers import Listener, TlsClient, echo, served_by
from .tokens import scratch

#: Debian has one version of it at a time.
POSTGRESQL = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"))), Path("/nowhere"))
PASSWORD = "of the application"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    with network(2) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("known")


@pytest.fixture(scope="module")
def pins(keys: Path) -> dict[str, str]:
    """Made as a user makes them; the keys are all in one directory."""
    names = ("db-1", "cache-1", "web-1", "keys-1", "proxy-1")
    made = {}
    for name in names:
        command = [TITUS_PY, "keys", "new", name, "--directory", keys]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
        made[name] = done.stdout.strip()
    return made


@contextmanager
def running(
    hosts: Network, number: int, command: list[str | Path], **options: object
) -> Iterator[None]:
    process = hosts.on(
        number,
        lambda: subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **options
        ),
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def postgresql(hosts: Network, number: int) -> Iterator[None]:
    """As Debian has it: on the loopback address, with a password for everybody."""
    directory = Path(tempfile.mkdtemp())
    user = pwd.getpwnam("postgres")
    try:
        os.chown(directory, user.pw_uid, user.pw_gid)
        (directory / "password").write_text(PASSWORD)
        (directory / "password").chmod(0o644)
        identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        data = directory / "data"
        words = ["--auth=scram-sha-256", "--no-sync", f"--pwfile={directory}/password", "-U", "app"]
        subprocess.run(
            [POSTGRESQL / "initdb", *words, data], stdout=subprocess.DEVNULL, check=True, **identity
        )
        settings = ("listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off")
        options = [word for setting in settings for word in ("-c", setting)]
        with running(
            hosts, number, [POSTGRESQL / "postgres", "-D", data, *options],
            stderr=subprocess.DEVNULL, **identity,
        ):  # fmt: skip
            yield
    finally:
        shutil.rmtree(directory)


def run_on_web(
    hosts: Network, command: Sequence[str], **environment: str
) -> "subprocess.CompletedProcess[str]":
    def run() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command,
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    done: subprocess.CompletedProcess[str] = hosts.on(2, run)
    return done


def psql(hosts: Network, password: str, query: str) -> "subprocess.CompletedProcess[str]":
    return run_on_web(
        hosts,
        ["psql", "-h", "127.0.0.1", "-U", "app", "-Atc", query, "postgres"],
        PGPASSWORD=password,
    )


def test_postgresql(serve: Serve, hosts: Network, keys: Path, pins: dict[str, str]) -> None:
    with postgresql(hosts, 1):
        db = serve_example(serve, hosts, 1, "postgresql/db-1.toml", keys, pins)
        web = serve_example(serve, hosts, 2, "postgresql/web-1.toml", keys, pins)
        # Self-signed, as it is meant to be.
        warnings = [*db.events_named("configuration"), *web.events_named("configuration")]
        assert not any("self-signed" in warning["problem"] for warning in warnings)
        eventually(lambda: psql(hosts, PASSWORD, "select 1").stdout == "1\n", "it answers")
        query = "select 'in ' || 'the clear', inet_client_addr()"
        with hosts.captured() as packets:
            assert psql(hosts, PASSWORD, query).stdout == "in the clear|127.0.0.1\n"
        assert packets
        assert not any(b"the clear" in packet for packet in packets)
        rows = psql(hosts, PASSWORD, "select generate_series(1, 100000)").stdout
        assert rows == "".join(f"{number}\n" for number in range(1, 100_001))
        # What a peer may do is PostgreSQL's to decide.
        refused = psql(hosts, "of somebody else", query)
        assert refused.returncode != 0
        assert "password authentication failed" in refused.stderr
    assert db.wait_for_event("connection_ended", client_name="web-1")


def test_redis(serve: Serve, hosts: Network, keys: Path, pins: dict[str, str]) -> None:
    words = [
        "redis-server",
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        keys,
        "--requirepass",
        PASSWORD,
    ]
    with running(hosts, 1, words):
        cache = serve_example(serve, hosts, 1, "redis/cache-1.toml", keys, pins)
        web = serve_example(serve, hosts, 2, "redis/web-1.toml", keys, pins)

        def redis(*command: str, password: str = PASSWORD) -> str:
            words = ["redis-cli", "--no-auth-warning", "-a", password, *command]
            done: subprocess.CompletedProcess[str] = hosts.on(
                2,
                lambda: subprocess.run(
                    words, capture_output=True, text=True, timeout=240, check=False
                ),
            )
            return done.stdout

        eventually(lambda: redis("ping") == "PONG\n", "it answers")
        value = "octets that nobody may read" * 1000
        with hosts.captured() as packets:
            assert redis("set", "key", value) == "OK\n"
            assert redis("get", "key") == f"{value}\n"
        assert packets
        assert not any(b"nobody may read" in packet for packet in packets)
        assert "NOAUTH" in redis("ping", password="of somebody else")
    assert cache.wait_for_event("connection_ended", client_name="web-1")
    # And without a server behind it, there is no answer, at once.
    assert redis("ping") == ""
    assert web.runs()


def test_the_pages_name_every_file() -> None:
    for page in EXAMPLES.glob("*/README.md"):
        text = page.read_text()
        for file in page.parent.iterdir():
            assert file == page or f"({file.name})" in text
        assert f"({page.parent.name}/README.md)" in (EXAMPLES / "README.md").read_text()


def test_a_site_whose_key_is_on_another_host(
    serve: Serve, hosts: Network, pins: dict[str, str], keys: Path, tmp_path: Path
) -> None:
    authority = ThrowawayAuthority()
    issued = authority.issue("P-256", ["www.example.org"])
    (tmp_path / "authority.pem").write_bytes(authority.certificate)
    (tmp_path / "site.crt").write_bytes(issued.certificate)
    (tmp_path / "site.key").touch(0o600)
    (tmp_path / "site.key").write_bytes(issued.key)
    upstream_user, *keyd_users = map(str, UIDS.take(3))
    with (
        scratch() as run,
        hosts.on(2, lambda: Listener.tcp(port=8080)) as application,
        served_by(application, echo),
    ):
        others = {
            "/etc/titus-py/site": str(tmp_path / "site"),
            "/run/titus-py": str(run),
            "titus-upstream": upstream_user,
        }
        for number, name in enumerate(("keys-1", "proxy-1"), 1):
            file, user = f"remote-keys/{name}.toml", keyd_users[number - 1]
            serve_example(serve, hosts, number, file, keys, pins, others, user)

        def shake_hands() -> bytes:
            ca, host = tmp_path / "authority.pem", "10.77.0.2"
            with TlsClient(443, "www.example.org", ca, host=host) as client:
                client.handshake().send(b"x")
                return client.receive_exactly(1)

        assert hosts.on(2, shake_hands) == b"x"
