"""A directory of certificates: hundreds of names behind one virtual host."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography import x509
from OpenSSL import SSL

from titus_py.audit.throwaway_authority import ThrowawayAuthority

from .conftest import Certificates, Serve
from .instance import TITUS_PY, Instance
from .peers import Listener, TlsClient, alert_in
from .service import problems, reload, status, talk

COUNT = 150
UNRECOGNIZED_NAME = 112
TLS12, TLS13 = SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION


class Live:
    """A directory as certbot lays it out: links to what is in an archive."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "live"
        self._archive = directory / "archive"
        self._authority = ThrowawayAuthority()
        self._versions: dict[str, int] = {}
        self.path.mkdir()
        (self.path / "README").write_text("This directory contains your keys and certificates.\n")

    def issue(self, name: str, names: Sequence[str] = (), kind: str = "P-256") -> None:
        """A certificate for these names, or for this one; a new version if there is one."""
        issued = self._authority.issue(kind, names or [name])
        self.put(name, issued.certificate, issued.key)

    def put(self, name: str, certificate: bytes, key: bytes) -> None:
        number = self._versions[name] = self._versions.get(name, 0) + 1
        # A new one is there with all that it has, at once: whoever looks in between finds nothing.
        place, archive = self.path / name, self._archive / name
        lives = place if place.exists() else self.path / f".{name}"
        for directory in (lives, archive):
            directory.mkdir(parents=True, exist_ok=True)
        (lives / "README").touch()
        for stem, content in (("fullchain", certificate), ("privkey", key)):
            file = archive / f"{stem}{number}.pem"
            file.touch(mode=0o600)
            file.write_bytes(content)
            link = lives / f"{stem}.new"
            link.symlink_to(os.path.relpath(file, lives))
            link.rename(lives / f"{stem}.pem")
        lives.rename(place)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Live:
    live = Live(tmp_path_factory.mktemp("certbot"))
    for number in range(COUNT):
        live.issue(f"host{number}.example", [f"host{number}.example", f"also{number}.example"])
    live.issue("wild", ["*.wild.example"])
    live.issue("tame", ["tame.wild.example"], "RSA-2048")
    return live


@pytest.fixture
def live(tmp_path: Path) -> Live:
    made = Live(tmp_path)
    for name in ("one.example", "two.example"):
        made.issue(name)
    return made


def shown(instance: Instance, name: str, newest: int = TLS13) -> x509.Certificate:
    """The certificate that a client is shown, once it has been served."""
    with TlsClient(instance.port, name, versions=(TLS12, newest)) as client:
        assert talk(client.handshake())
        certificate = client.tls.get_peer_certificate(as_cryptography=True)
        assert isinstance(certificate, x509.Certificate)
        return certificate


def names(certificate: x509.Certificate) -> list[str]:
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return extension.value.get_values_for_type(x509.DNSName)


def serial(instance: Instance, name: str) -> int:
    return shown(instance, name).serial_number


@pytest.fixture(scope="module")
def instance(serve_all: Serve, echoing: Listener, many: Live) -> Instance:
    return serve_all(
        vhost=[
            {"certificate_dir": many.path, "backend": echoing.address},
            {"sni": ["left.example"], "backend": echoing.address},
        ]
    )


@pytest.mark.parametrize("newest", [TLS12, TLS13])
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("host0.example", ["host0.example", "also0.example"]),
        (f"ALSO{COUNT - 1}.example", [f"host{COUNT - 1}.example", f"also{COUNT - 1}.example"]),
        ("any.wild.example", ["*.wild.example"]),
        ("tame.wild.example", ["tame.wild.example"]),
        ("left.example", ["localhost"]),
    ],
)
def test_each_name_has_its_certificate(
    instance: Instance, asked: str, expected: list[str], newest: int
) -> None:
    assert names(shown(instance, asked, newest)) == expected


@pytest.mark.parametrize("name", ["wild.example", "a.b.wild.example", "host0.example.com"])
def test_a_name_of_none_is_refused(instance: Instance, name: str) -> None:
    with TlsClient(instance.port, name) as client:
        with pytest.raises(SSL.Error):
            client.handshake()
        assert alert_in(client.received) == UNRECOGNIZED_NAME


def test_the_status_says_how_many_and_which_expires_first(instance: Instance, many: Live) -> None:
    told = status(instance)
    (directory,) = told["certificate_dirs"]
    assert directory["directory"] == str(many.path)
    assert directory["certificates"] == COUNT + 2
    assert directory["days_left"] == 89
    assert [one["names"] for one in told["certificates"]] == [["localhost"]]
    assert told["certificates_kept"] == 0
    assert told["vhosts"][0]["certificate_dir"] == str(many.path)


def test_a_reload_takes_what_is_new_and_forgets_what_is_gone(
    serve: Serve, echoing: Listener, live: Live
) -> None:
    instance = serve(echoing.address, vhost=[{"certificate_dir": live.path}])
    before = serial(instance, "one.example")
    with TlsClient(instance.port, "two.example") as client:
        assert talk(client.handshake())
        live.issue("one.example")
        live.issue("three.example")
        (live.path / "two.example").rename(live.path / ".gone")
        assert reload(instance)["reloaded"]
        assert serial(instance, "one.example") != before
        assert names(shown(instance, "three.example")) == ["three.example"]
        with TlsClient(instance.port, "two.example") as late, pytest.raises(SSL.Error):
            late.handshake()
        assert talk(client)


def test_a_bad_certificate_keeps_its_old_version_and_the_others_go_on(
    serve: Serve, echoing: Listener, live: Live
) -> None:
    instance = serve(echoing.address, vhost=[{"certificate_dir": live.path}])
    before = {name: serial(instance, name) for name in ("one.example", "two.example")}
    chain = live.path / "one.example" / "fullchain.pem"
    good = chain.read_bytes()
    chain.write_bytes(good[: len(good) // 2])
    live.issue("two.example")
    for _ in range(2):
        since = len(instance.events())
        assert reload(instance)["reloaded"]
        event = instance.wait_for_event("certificate_kept", since=since)
        assert event["file"] == str(chain)
        assert "cut off" in event["reason"]
        assert event["level"] == "error"
        assert serial(instance, "one.example") == before["one.example"]
        assert serial(instance, "two.example") != before["two.example"]
        assert status(instance)["certificates_kept"] == 1
    chain.write_bytes(good)
    assert reload(instance)["reloaded"]
    assert status(instance)["certificates_kept"] == 0


@pytest.mark.parametrize("kind", ["P-256", "RSA-2048", "Ed25519"])
def test_a_key_that_is_gone_is_handed_on_from_keyd_to_keyd(
    serve: Serve, echoing: Listener, live: Live, kind: str
) -> None:
    live.issue("one.example", kind=kind)
    instance = serve(echoing.address, vhost=[{"certificate_dir": live.path}])
    before = {name: serial(instance, name) for name in ("one.example", "two.example")}
    live.put("one.example", b"no certificate\n", b"no key\n")
    for generation in (2, 3):
        live.issue("two.example")
        assert reload(instance) == {"reloaded": True, "generation": generation}
        assert serial(instance, "one.example") == before["one.example"]
        assert serial(instance, "two.example") != before["two.example"]
    live.issue("one.example")
    assert reload(instance)["reloaded"]
    assert serial(instance, "one.example") != before["one.example"]
    assert not instance.events_named("keys_changed")


def test_a_key_that_no_process_has_any_more_is_missed_once(
    serve: Serve, echoing: Listener, live: Live
) -> None:
    instance = serve(echoing.address, vhost=[{"certificate_dir": live.path}])
    before = serial(instance, "two.example")
    live.put("one.example", b"no certificate\n", b"no key\n")
    assert reload(instance)["reloaded"]
    instance.wait_for_event("reloaded")
    instance.expected_alarms |= {"keyd_died"}
    instance.keyd().kill()
    instance.wait_for_event("reload_failed")
    assert serial(instance, "two.example") == before
    with TlsClient(instance.port, "one.example") as client, pytest.raises(SSL.Error):
        client.handshake()
    assert len(instance.events_named("keys_changed")) == 1


def test_a_bad_certificate_that_is_new_changes_nothing(
    serve: Serve, echoing: Listener, live: Live
) -> None:
    """It has no old version."""
    instance = serve(echoing.address, vhost=[{"certificate_dir": live.path}])
    before = serial(instance, "one.example")
    live.issue("one.example")
    live.put("bad.example", b"no certificate\n", b"no key\n")
    told = problems(instance)
    assert all(str(live.path / "bad.example") in problem for problem in told)
    assert len(told) == 2
    assert serial(instance, "one.example") == before


def test_a_change_is_noticed(serve: Serve, echoing: Listener, live: Live) -> None:
    instance = serve(
        echoing.address,
        vhost=[{"certificate_dir": live.path}],
        service={"reload_on_change": True},
    )
    live.issue("three.example")
    instance.wait_for_event("files_changed", action="reloading")
    instance.wait_for_event("reloaded")
    assert names(shown(instance, "three.example")) == ["three.example"]


# --- with other settings -----------------------------------------------------------------


def test_protocols_are_negotiated_as_elsewhere(serve: Serve, echoing: Listener, live: Live) -> None:
    instance = serve(
        echoing.address, vhost=[{"certificate_dir": live.path, "alpn": ["h2", "http/1.1"]}]
    )
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{instance.port}", "-alpn", "h2"]
    command += ["-servername", "two.example"]
    said = subprocess.run(command, input=b"", capture_output=True, timeout=240, check=True).stdout
    assert b"ALPN protocol: h2" in said
    assert b"CN = two.example" in said or b"CN=two.example" in said


def test_clients_show_certificates_as_elsewhere(
    serve: Serve, echoing: Listener, live: Live, certificates: Certificates
) -> None:
    client = certificates("P-256", "client.example")
    instance = serve(
        echoing.address,
        vhost=[
            {
                "certificate_dir": live.path,
                "client_certificates": "required",
                "client_ca": client.authority,
                "client_allow": "all",
            }
        ],
    )
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{instance.port}", "-tls1_2"]
    command += ["-servername", "two.example"]
    shown = ["-cert", client.certificate, "-key", client.key]
    codes = [
        subprocess.run(
            [*command, *more], input=b"", capture_output=True, timeout=240, check=False
        ).returncode
        for more in (shown, [])
    ]
    assert codes == [0, 1]


def test_a_keyd_of_its_own_has_the_keys(
    serve: Serve, echoing: Listener, live: Live, tmp_path: Path
) -> None:
    """And the directory need not have them."""
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o700)
    options = [f"--socket={tmp_path}/keyd.control", "--user=nobody", f"--chroot={tmp_path}/root"]
    for number, pair in enumerate(sorted(live.path.iterdir())):
        if pair.is_dir():
            (pair / "privkey.pem").resolve().rename(keys / f"{number}.pem")
            (pair / "privkey.pem").unlink()
            options.append(f"--key={keys}/{number}.pem")
    keyd = subprocess.Popen([TITUS_PY.parent / "keyd", "control", *options])
    try:
        instance = serve(
            echoing.address,
            keyd={"socket": tmp_path / "keyd.control"},
            vhost=[{"certificate_dir": live.path}],
        )
        assert names(shown(instance, "two.example")) == ["two.example"]
    finally:
        keyd.kill()
        keyd.wait()
