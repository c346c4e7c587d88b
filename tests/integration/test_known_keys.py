"""``titus-py keys``: keys that openssl accepts, and pins that it agrees to."""

import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from keyd.making import generate, self_signed
from titus_py.commands.keys_new import new
from titus_py.commands.keys_pin import pin

from .conftest import Serve
from .instance import TITUS_PY, Event, Instance, eventually, free_port
from .peers import Listener, receive_exactly, served_by, was_reset
from .peers import connect as plain


class Done(NamedTuple):
    code: int
    said: str
    explained: str


def keys(*arguments: str | Path, user: int | None = None) -> Done:
    command = [str(TITUS_PY), "keys", *map(str, arguments)]
    if user is not None:
        command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command]
        command = in_reach(command)
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def in_reach(command: list[str]) -> list[str]:
    """With an open directory in place of one that is root's alone, where the checkout is in one."""
    checkout = TITUS_PY.parents[2]
    closed = [above for above in checkout.parents if not above.stat().st_mode & 0o1]
    if not closed:
        return command
    script = (
        'mount --bind "$1" /mnt && mount -t tmpfs -o mode=755 none "$2" && mkdir -p "$1"'
        ' && mount --bind /mnt "$1" && shift 2 && exec "$@"'
    )
    unshared = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    return [*unshared, str(checkout), str(closed[-1]), *command]


def openssl(*arguments: str | Path, stdin: bytes = b"") -> bytes:
    return subprocess.run(
        ["openssl", *arguments], input=stdin, capture_output=True, check=True
    ).stdout


def pin_by_openssl(certificate: Path) -> str:
    key = openssl("x509", "-in", certificate, "-noout", "-pubkey")
    der = openssl("pkey", "-pubin", "-outform", "DER", stdin=key)
    digest = openssl("dgst", "-sha256", "-r", stdin=der)
    return "sha256:" + digest.split()[0].decode()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def web(directory: Path) -> Path:
    """The certificate of a known key."""
    done = keys("new", "web-1", "--directory", directory)
    assert done.code == 0, done.explained
    assert done.said == pin_by_openssl(directory / "web-1.crt") + "\n"
    assert done.said.strip() in done.explained
    return directory / "web-1.crt"


def test_what_is_made(web: Path) -> None:
    key = web.with_suffix(".key")
    assert key.stat().st_mode & 0o7777 == 0o600
    assert (key.stat().st_uid, web.stat().st_mode & 0o7777) == (0, 0o644)
    assert sorted(path.name for path in web.parent.iterdir()) == ["web-1.crt", "web-1.key"]
    text = openssl("x509", "-in", web, "-noout", "-text", "-nameopt", "RFC2253").decode()
    for expected in (
        "Subject: CN=web-1",
        "DNS:web-1",
        "prime256v1",
        "CA:FALSE",
        "TLS Web Server Authentication, TLS Web Client Authentication",
    ):
        assert expected in text
    in_decades = str(30 * 365 * 86400)
    openssl("x509", "-in", web, "-noout", "-checkend", in_decades)
    public = openssl("x509", "-in", web, "-noout", "-pubkey")
    assert openssl("pkey", "-in", key, "-pubout") == public
    for purpose in ("sslserver", "sslclient"):
        openssl("verify", "-CAfile", web, "-purpose", purpose, web)


def test_nothing_is_overwritten_unless_it_is_said(
    web: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in web.parent.iterdir()}
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)

    def there() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    assert new("web-1", tmp_path, "p-256", force=False, config=None) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{tmp_path}/web-1.key is there already" in printed.err
    assert "--force" in printed.err
    assert there() == before
    assert new("web-1", tmp_path, "rsa-2048", force=True, config=None) == 0
    after = there()
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)
    assert (tmp_path / "web-1.key").stat().st_mode & 0o7777 == 0o600
    assert capsys.readouterr().out.strip() == pin_by_openssl(tmp_path / "web-1.crt")
    public = openssl("x509", "-in", tmp_path / "web-1.crt", "-noout", "-pubkey")
    assert openssl("pkey", "-in", tmp_path / "web-1.key", "-pubout") == public


@pytest.mark.parametrize(
    ("name", "directory", "said"),
    [
        ("web_1.example.org/x", "", "is no host name"),
        ("a" * 60 + ".example.org", "", "has 72 characters"),
        ("192.0.2.1", "", "IP address"),
        ("web-1", "none", "none: is no directory"),
        ("web-1", "strangers", "chown root"),
    ],
)
def test_a_mistake_makes_nothing(
    name: str, directory: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "strangers").mkdir()
    os.chown(tmp_path / "strangers", 12345, 12345)
    assert new(name, tmp_path / directory, "p-256", force=False, config=None) == 2
    printed = capsys.readouterr()
    assert (printed.out, said in printed.err) == ("", True)
    assert [path.name for path in tmp_path.rglob("*")] == ["strangers"]


def test_a_configuration_that_is_named_has_to_be_good(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[keyd]\nuser = 7.5\n")
    done = keys("new", "web-1", "--config", tmp_path / "bad.toml", "--directory", tmp_path)
    assert (done.code, done.said) == (2, "")
    assert "bad.toml" in done.explained
    assert [path.name for path in tmp_path.iterdir()] == ["bad.toml"]


def test_only_root_makes_keys(tmp_path: Path) -> None:
    done = keys("new", "web-1", "--directory", tmp_path, user=12345)
    assert (done.code, done.said) == (2, "")
    assert "must be run as root" in done.explained


def test_the_pin_of_a_chains_first_for_anybody(web: Path) -> None:
    """Nobody needs to be root for that."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        chain = Path(directory) / "chain.pem"
        own = self_signed("db-1", generate("ed25519"), 0)
        chain.write_bytes(own + web.read_bytes())
        shown = keys("pin", chain, user=12345)
        assert (shown.code, shown.said.strip()) == (0, pin_by_openssl(chain))
    assert f"not the one to pin: {pin_by_openssl(web)}" in shown.explained


def test_what_has_no_pin(web: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, said in {
        web.with_suffix(".key"): "has a private key in it, which is not read",
        tmp_path / "none": "no such file or directory",
        tmp_path: "is no regular file",
        tmp_path / "pipe": "is no regular file",
    }.items():
        assert pin(str(path), None, 10) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert f"{path}: {said}" in printed.err


@contextmanager
def s_server(*options: str | Path) -> Iterator[int]:
    port = free_port()
    process = subprocess.Popen(
        ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-quiet", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def listens() -> bool:
        # A connection would be one that it serves.
        return f":{port:04X} 00000000:0000 0A" in Path("/proc/net/tcp").read_text()

    try:
        eventually(listens, "openssl listens")
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("options", [("-tls1_2",), ("-tls1_2", "-Verify", "1"), ("-Verify", "1")])
def test_the_pin_of_a_server(web: Path, options: Sequence[str]) -> None:
    """Also of one that asks for a client's certificate, which this client has not."""
    with s_server("-cert", web, "-key", web.with_suffix(".key"), *options) as port:
        done = keys("pin", f"127.0.0.1:{port}")
    assert (done.code, done.said) == (0, pin_by_openssl(web) + "\n"), done.explained
    assert "CN=web-1" in done.explained
    assert "compare this pin by another way" in done.explained


def test_the_name_that_a_server_is_asked_for(web: Path, tmp_path: Path) -> None:
    other, key = tmp_path / "other.crt", generate("p-256")
    other.write_bytes(self_signed("other", key, int(time.time())))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    other.with_suffix(".key").write_bytes(private)
    options = ("-cert", web, "-key", web.with_suffix(".key"), "-servername", "other.test")
    second = ("-cert2", other, "-key2", other.with_suffix(".key"))
    with s_server(*options, *second) as port:
        assert keys("pin", f"localhost:{port}").said.strip() == pin_by_openssl(web)
        named = keys("pin", f"127.0.0.1:{port}", "--server-name", "other.test")
        assert named.said.strip() == pin_by_openssl(other)


def test_servers_that_show_no_certificate(tmp_path: Path) -> None:
    def answer(content: bytes) -> None:
        client = listener.accept()
        client.sendall(content)
        client.close()

    with Listener.tcp() as listener:
        speaking = threading.Thread(target=answer, args=(b"220 mail.example.org ESMTP\r\n",))
        speaking.start()
        done = keys("pin", listener.address)
        speaking.join()
        assert (done.code, done.said) == (1, "")
        assert "no certificate was shown: " in done.explained
        # One that says nothing.
        done = keys("pin", listener.address, "--timeout", "0.2")
        assert (done.code, done.said) == (1, "")
        assert "no answer within" in done.explained
    done = keys("pin", listener.address)
    assert (done.code, done.said) == (1, "")
    assert f"{listener.address}: cannot be connected to: connection refused" in done.explained


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"N", "the server has no TLS"),
        (b"E", "no server of PostgreSQL: it says b'E'"),
        (b"", "no server of PostgreSQL: it has closed the connection"),
    ],
)
def test_servers_that_are_asked_for_tls_and_have_none(
    answer: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bytes] = []

    def refuse(connection: socket.socket) -> None:
        asked.append(connection.recv(9))
        connection.sendall(answer)

    with Listener.tcp() as listener, served_by(listener, refuse):
        assert pin(listener.address, None, 10, "postgresql") == 1
    printed = capsys.readouterr()
    assert (printed.out, f"no certificate was shown: {reason}" in printed.err) == ("", True)
    assert asked == [bytes.fromhex("0000000804d2162f")]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("unix:x.sock", "is a unix socket: a server is written HOST:PORT"),
        ("127.0.0.1:0", "expected a port"),
        ("::1:443", "brackets"),
        ("https://example.org", "no such file"),
        ("example.org", "HOST:PORT"),
        (":443", "means every address"),
    ],
)
def test_what_is_no_server(asked: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pin(asked, None, 10) == 2
    printed = capsys.readouterr()
    assert (printed.out, said in printed.err) == ("", True)


class Host:
    """One of the two hosts, with its directory of keys, and its instance once that serves."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name, self.keys = name, directory / name
        self.keys.mkdir()
        self.pin = self.make(self.keys)
        self.credential = {
            "certificate": self.keys / f"{name}.crt",
            "key": self.keys / f"{name}.key",
        }
        self.instance: Instance | None = None

    def make(self, directory: Path) -> str:
        done = keys("new", self.name, "--directory", directory)
        assert done.code == 0, done.explained
        return done.said.strip()

    def make_new(self) -> str:
        (self.keys / "new").mkdir(mode=0o700)
        return self.make(self.keys / "new")

    def put_new_in_place(self) -> None:
        for path in (self.keys / "new").iterdir():
            path.rename(self.keys / path.name)

    def change(self, before: str, after: str) -> None:
        assert self.instance is not None
        file = self.instance.directory / "titus.toml"
        text = file.read_text()
        assert text.count(before) == 1
        file.write_text(text.replace(before, after))

    def reload(self, *options: str) -> str:
        assert self.instance is not None
        command = [TITUS_PY, "reload", f"--pid={self.instance.pid}", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


def test_two_hosts_and_new_keys(serve: Serve, echoing: Listener, tmp_path: Path) -> None:
    """Each step as docs/known-keys.md has it, with both keys replaced in the same reloads."""
    db, web = Host(tmp_path, "db-1"), Host(tmp_path, "web-1")
    known = {"client_certificates": "required", "client": [{"name": "web-1", "spki": [web.pin]}]}
    db.instance = serving = serve(echoing.address, vhost=[{**db.credential, **known}])
    tls = f"127.0.0.1:{serving.port}"
    assert keys("pin", tls).said.strip() == db.pin
    tunnel = {"connect": tls, "pins": [db.pin], **web.credential}
    local = free_port()
    web.instance = serve(listen=[], vhost=[], tunnel=[{"listen": f"127.0.0.1:{local}", **tunnel}])

    def connect() -> socket.socket:
        client = plain(local)
        client.sendall(b"hello")
        assert receive_exactly(client, 5) == b"hello"
        return client

    def shown(pin: str) -> list[Event]:
        return serving.events_named("connection_ended", client_name="web-1", certificate_spki=pin)

    with connect() as with_old:
        new_db, new_web = db.make_new(), web.make_new()
        # Each learns the other's new key.
        web.change(f'"{db.pin}"', f'"{db.pin}", "{new_db}"')
        web.reload()
        connect().close()
        db.change(f'"{web.pin}"', f'"{web.pin}", "{new_web}"')
        # Each uses its own, and forgets the other's old one.
        db.put_new_in_place()
        db.reload()
        assert keys("pin", tls).said.strip() == new_db
        connect().close()
        web.put_new_in_place()
        web.change(f'"{db.pin}", "{new_db}"', f'"{new_db}"')
        web.reload()
        connect().close()
        eventually(lambda: shown(new_web), "the new key is in use")
        db.change(f'"{web.pin}", "{new_web}"', f'"{new_web}"')
        assert "1 connection ended" in db.reload("--cut")
        assert was_reset(with_old)
        connect().close()

    def cut() -> list[Event]:
        return [event for event in shown(web.pin) if event["end"] == "no_longer_allowed"]

    (_,) = eventually(cut, "it is told of")
