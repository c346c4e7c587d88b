"""``titus-py rekey``: new keys, requests that openssl accepts, and answers put in place."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from .conftest import Serve
from .instance import TITUS_PY, Instance, toml
from .peers import Listener, TlsClient

NAMES = ("www.example.org", "example.org", "192.0.2.7")
NEW = ("new.key", "new.csr", "new.crt")


def openssl(*arguments: str | Path, stdin: str | None = None) -> str:
    done = subprocess.run(
        ["openssl", *arguments], input=stdin, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


class Company:
    """A small authority, as a company has one: openssl(1) and two files."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.certificate, self._key = directory / "ca.crt", directory / "ca.key"
        openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-subj", "/O=Company/CN=root", "-days", "100"),
            *("-keyout", self._key, "-out", self.certificate),
        )

    def certify(self, request: Path, answer: Path) -> None:
        openssl(
            *("x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key),
            *("-copy_extensions", "copyall", "-days", "30", "-out", answer),
        )

    def certify_for(self, year: int, request: Path, answer: Path) -> None:
        """Valid in January of that year, which not every openssl(1) can do."""
        key = load_pem_private_key(self._key.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        asked = x509.load_pem_x509_csr(request.read_bytes())
        builder = (
            x509.CertificateBuilder()
            .subject_name(asked.subject)
            .issuer_name(x509.load_pem_x509_certificate(self.certificate.read_bytes()).subject)
            .public_key(asked.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime(year, 1, 1))
            .not_valid_after(datetime(year, 2, 1))
        )
        for extension in asked.extensions:
            builder = builder.add_extension(extension.value, extension.critical)
        answer.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))

    def issue(
        self, certificate: Path, key: Path, kind: Sequence[str], names: Sequence[str] = NAMES
    ) -> None:
        """A certificate and a new key, for these names, with must-staple."""
        san = ",".join(f"{'IP' if name[0].isdigit() else 'DNS'}:{name}" for name in names)
        request = certificate.with_suffix(".csr")
        openssl(
            *("req", "-new", "-newkey", *kind, "-subj", f"/O=Company/CN={names[0]}"),
            *("-addext", f"subjectAltName={san}", "-addext", "tlsfeature=status_request"),
            *("-keyout", key, "-out", request),
        )
        key.chmod(0o600)
        self.certify(request, certificate)
        request.unlink()


RSA = ("rsa:2048", "-nodes")
P_256 = ("ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
P_384_ENCRYPTED = ("ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-passout", "pass:open sesame")
ED25519 = ("ed25519", "-nodes")


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Company:
    return Company(tmp_path_factory.mktemp("company") / "ca")


WAITING = "titus-py rekey: waiting for another command that makes keys to end\n"


def rekey(*arguments: str | Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [TITUS_PY, "rekey", *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    # That another test's is running does not matter here.
    return done.returncode, done.stdout, done.stderr.replace(WAITING, "")


def alone(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """As on a machine where no instance runs: those of other tests are out of sight."""
    script = 'mkdir -p /run/titus-py && mount -t tmpfs none /run/titus-py && exec "$@"'
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def without_an_instance(*arguments: str | Path) -> tuple[int, str, str]:
    done = alone(TITUS_PY, "rekey", *arguments)
    return done.returncode, done.stdout, done.stderr


def pairs(company: Company, directory: Path, *names: str) -> Path:
    """A directory like certbot's live/, with a small pair for each name."""
    for name in names:
        (directory / name).mkdir(parents=True)
        certificate, key = directory / name / "fullchain.pem", directory / name / "privkey.pem"
        company.issue(certificate, key, P_256, (name,))
    return directory


def public_key(certificate: Path) -> str:
    return openssl("x509", "-in", certificate, "-noout", "-pubkey")


def public_key_of(key: Path, *options: str) -> str:
    return openssl("pkey", "-in", key, "-pubout", *options)


def files(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mode)
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def site(
    company: Company, serve: Serve, echoing: Listener, tmp_path: Path
) -> tuple[Instance, Path]:
    """An instance with a key of each kind, one of them encrypted; and where its files are."""
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("open sesame\n")
    passphrase.chmod(0o600)
    vhosts = []
    for name, kind in (("rsa", RSA), ("p384", P_384_ENCRYPTED), ("ed25519", ED25519)):
        certificate, key = tmp_path / f"{name}.crt", tmp_path / f"{name}.key"
        company.issue(certificate, key, kind, (f"{name}.example.org", *NAMES))
        vhost = {"sni": [f"{name}.example.org"], "certificate": certificate, "key": key}
        if kind is P_384_ENCRYPTED:
            vhost["passphrase_file"] = passphrase
        vhosts.append(vhost)
    vhosts.append({"certificate_dir": pairs(company, tmp_path / "live", "dir.example.org")})
    return serve(backend=echoing.address, vhost=vhosts), tmp_path


def shown_to(instance: Instance, name: str) -> x509.Certificate:
    with TlsClient(instance.port, name) as client:
        client.handshake()
        shown = client.tls.get_peer_certificate(as_cryptography=True)
    assert shown is not None
    return shown


def test_from_the_old_key_to_the_new_one_that_is_served(
    site: tuple[Instance, Path], company: Company
) -> None:
    instance, directory = site
    configuration = instance.directory / "titus.toml"
    names = ("rsa", "p384", "ed25519")
    asked = [f"{name}.example.org" for name in names]
    os.chown(directory / "rsa.key", 12345, 54321)
    before = files(directory)

    code, said, complaints = rekey("--config", configuration, *asked)
    assert (code, complaints) == (0, "")
    assert said.splitlines() == [
        f"{name}.example.org: have this certified: {directory}/{name}.new.csr" for name in names
    ]
    assert files(directory).items() >= before.items()
    for name in names:
        new, request = directory / f"{name}.new.key", directory / f"{name}.new.csr"
        assert new.stat().st_mode & 0o7777 == 0o600
        text = openssl("req", "-in", request, "-noout", "-verify", "-text")
        assert "verify OK" in text
        # Later versions of openssl write no spaces around the sign.
        assert f"Subject: O=Company, CN={name}.example.org" in text.replace(" = ", "=")
        san = ", ".join(f"DNS:{one}" for one in (f"{name}.example.org", *NAMES[:2]))
        assert f"{san}, IP Address:192.0.2.7" in text
        assert "status_request" in text
        password = () if name != "p384" else ("-passin", "pass:open sesame")
        assert public_key_of(new, *password) == openssl("req", "-in", request, "-noout", "-pubkey")
        assert public_key_of(new, *password) != public_key(directory / f"{name}.crt")
    assert (directory / "rsa.new.key").stat().st_uid == 12345
    assert (directory / "rsa.new.key").stat().st_gid == 54321
    assert "BEGIN ENCRYPTED PRIVATE KEY" in (directory / "p384.new.key").read_text()
    assert "2048 bit" in openssl("pkey", "-in", directory / "rsa.new.key", "-noout", "-text")
    assert "ED25519" in openssl("pkey", "-in", directory / "ed25519.new.key", "-noout", "-text")
    assert "384 bit" in openssl(
        *("pkey", "-in", directory / "p384.new.key", "-noout", "-text"),
        *("-passin", "pass:open sesame"),
    )

    # Again: nothing is made twice.
    after = files(directory)
    code, said, complaints = rekey("--config", configuration, *asked)
    assert (code, complaints, said.count(": waits to be certified: ")) == (0, "", 3)
    assert files(directory) == after

    # Two of three answers have come.
    for name in ("rsa", "p384"):
        company.certify(directory / f"{name}.new.csr", directory / f"{name}.new.crt")
    pid = f"--pid={instance.pid}"
    code, said, complaints = rekey("--install", "--dry-run", pid, "--config", configuration, *asked)
    assert (code, said.count(": would replace ")) == (0, 2)
    assert files(directory).items() >= after.items()

    # A reload that is refused leaves everything as it was.
    before_that = files(directory)
    own = instance.directory / "own.toml"
    own.write_bytes(configuration.read_bytes())
    configuration.write_text(own.read_text() + "\n[worker2]\n")
    code, said, complaints = rekey("--install", pid, "--config", own, *asked)
    assert (code, said) == (1, "")
    assert "not reloaded: " in complaints
    assert "worker2" in complaints
    assert complaints.endswith("the old certificates and keys are in place again\n")
    assert files(directory) == before_that
    configuration.write_bytes(own.read_bytes())

    # One of those that a directory of certificates has is asked for by its name as well.
    asked.append("dir.example.org")
    assert rekey("--config", configuration, "dir.example.org")[0] == 0
    new = directory / "live/dir.example.org/privkey.new"
    company.certify(Path(f"{new}.csr"), Path(f"{new}.crt"))

    code, said, complaints = rekey("--install", pid, "--config", configuration, *asked)
    assert code == 0, complaints
    assert "reloaded: generation 2 serves" in said
    shown = shown_to(instance, "dir.example.org")
    in_place = new.with_name("fullchain.pem").read_bytes()
    assert shown == x509.load_pem_x509_certificate(in_place)
    assert not Path(f"{new}.key").exists()
    passed_over = (
        "titus-py rekey: ed25519.example.org: passed over: its certificate is to be "
        f"{directory}/ed25519.new.crt"
    )
    # What clients may refuse is said as well.
    more = [line for line in complaints.splitlines() if line != passed_over]
    assert len(more) < len(complaints.splitlines())
    assert all("has must-staple" in line for line in more), complaints
    for name in ("rsa", "p384"):
        shown = shown_to(instance, f"{name}.example.org")
        assert shown == x509.load_pem_x509_certificate((directory / f"{name}.crt").read_bytes())
        for file in (f"{name}.key", f"{name}.crt"):
            (kept,) = directory.glob(f"{file}.*.old")
            assert re.fullmatch(rf"{file}\.\d{{8}}T\d{{6}}Z\.old", kept.name)
            assert (kept.read_bytes(), kept.stat().st_mode) == before[file]
            assert (directory / file).stat().st_mode == before[file][1]
        assert not any((directory / f"{name}.{new}").exists() for new in NEW)
    assert (directory / "rsa.key").stat().st_uid == 12345
    assert (directory / "ed25519.new.key").exists()


def test_a_hundred_certificates_of_a_directory(company: Company, tmp_path: Path) -> None:
    first = pairs(company, tmp_path / "live", "site-0.example") / "site-0.example"
    for number in range(1, 100):
        directory = tmp_path / f"live/site-{number}.example"
        directory.mkdir()
        for name in ("fullchain.pem", "privkey.pem"):
            (directory / name).write_bytes((first / name).read_bytes())
    code, said, complaints = rekey(f"{tmp_path}/live")
    assert (code, complaints, len(said.splitlines())) == (0, "", 100)
    keys = set()
    for number in range(100):
        directory = tmp_path / f"live/site-{number}.example"
        key = load_pem_private_key((directory / "privkey.new.key").read_bytes(), None)
        request = x509.load_pem_x509_csr((directory / "privkey.new.csr").read_bytes())
        assert request.is_signature_valid
        assert request.public_key() == key.public_key()
        keys.add(request.public_key().public_numbers())  # type: ignore[union-attr]
    assert len(keys) == 100
    request = tmp_path / "live/site-99.example/privkey.new.csr"
    assert "verify OK" in openssl("req", "-in", request, "-noout", "-verify")
    for number in (7, 99):
        directory = tmp_path / f"live/site-{number}.example"
        company.certify(directory / "privkey.new.csr", directory / "privkey.new.crt")
    code, said, complaints = without_an_instance("--install", f"{tmp_path}/live/")
    assert (code, complaints.count(": passed over: ")) == (0, 98)
    assert "no instance is running" in complaints
    for number in (7, 99):
        directory = tmp_path / f"live/site-{number}.example"
        new = public_key(directory / "fullchain.pem")
        assert new == public_key_of(directory / "privkey.pem")
        assert new != public_key(first / "fullchain.pem")


def test_another_kind_and_files_with_both(company: Company, tmp_path: Path) -> None:
    """NAME.pem with both, and one directory of the kind that certbot makes, with its links."""
    company.issue(tmp_path / "c", tmp_path / "k", RSA)
    both = tmp_path / "certificates/www.pem"
    both.parent.mkdir()
    both.write_bytes((tmp_path / "c").read_bytes() + (tmp_path / "k").read_bytes())
    both.chmod(0o600)
    lineage = pairs(company, tmp_path / "live", "links.example") / "links.example"
    archive = tmp_path / "archive/links.example"
    archive.mkdir(parents=True)
    (lineage / "cert.pem").write_bytes((lineage / "fullchain.pem").read_bytes())
    (lineage / "chain.pem").touch()
    for name in ("cert", "chain", "fullchain", "privkey"):
        (lineage / f"{name}.pem").rename(archive / f"{name}1.pem")
        (lineage / f"{name}.pem").symlink_to(f"../../archive/links.example/{name}1.pem")
    asked = (f"{both.parent}/", lineage)
    assert rekey("--kind=p-256", *asked)[0] == 0
    for new in (both.parent / "www.new.key", lineage / "privkey.new.key"):
        assert "prime256v1" in openssl("pkey", "-in", new, "-noout", "-text")
        company.certify(new.with_suffix(".csr"), new.with_suffix(".crt"))
        with new.with_suffix(".crt").open("a") as chain:
            chain.write(company.certificate.read_text())
    code, _, complaints = without_an_instance("--install", *asked)
    assert code == 0, complaints
    assert public_key(both) == public_key_of(both)
    assert both.stat().st_mode & 0o777 == 0o600
    assert (lineage / "privkey.pem").is_symlink()
    new = public_key(archive / "fullchain1.pem")
    assert new == public_key_of(archive / "privkey1.pem") == public_key(archive / "cert1.pem")
    assert public_key(archive / "chain1.pem") == public_key(company.certificate)
    # The directories have the same pairs as before: what is kept and what is new is not of them.
    assert rekey("--dry-run", *asked)[1].count("would make") == 2


def test_every_mistake_at_once_and_nothing_is_done(company: Company, tmp_path: Path) -> None:
    names = ("good.example", "wrong.example", "other.example", "late.example", "early.example")
    live = pairs(company, tmp_path / "live", *names)
    assert rekey(live)[0] == 0

    def request(name: str) -> Path:
        return live / name / "privkey.new.csr"

    def answer(name: str) -> Path:
        return live / name / "privkey.new.crt"

    company.certify(request("good.example"), answer("good.example"))
    company.certify(request("good.example"), answer("wrong.example"))
    company.certify_for(2020, request("late.example"), answer("late.example"))
    company.certify_for(2090, request("early.example"), answer("early.example"))
    # For the right key, and for another name.
    openssl(
        *("req", "-new", "-key", live / "other.example/privkey.new.key", "-subj", "/CN=x"),
        *("-addext", "subjectAltName=DNS:x.example", "-out", tmp_path / "x.csr"),
    )
    company.certify(tmp_path / "x.csr", answer("other.example"))
    before = files(tmp_path)
    code, said, complaints = without_an_instance("--install", f"{live}/", f"{tmp_path}/nowhere/")
    assert (code, said) == (2, "")
    for expected in (
        f"{tmp_path}/nowhere: no such file or directory",
        f"privkey.new.key is not the key of certificate {answer('wrong.example')}",
        f"{answer('other.example')} is not for other.example, as the old certificate is: it is for "
        "x.example",
        f"{answer('late.example')} expired on 2020-02-01",
        f"{answer('early.example')} is not valid before 2090-01-01",
    ):
        assert expected in complaints
    assert files(tmp_path) == before


def test_names_that_nobody_has_keys_that_two_have_and_keys_without_request(
    company: Company, serve: Serve, echoing: Listener, tmp_path: Path
) -> None:
    company.issue(tmp_path / "one.crt", tmp_path / "both.key", P_256, ("one.example",))
    openssl(
        *("req", "-new", "-key", tmp_path / "both.key", "-subj", "/CN=two.example"),
        *("-addext", "subjectAltName=DNS:two.example", "-out", tmp_path / "two.csr"),
    )
    company.certify(tmp_path / "two.csr", tmp_path / "two.crt")
    live = pairs(company, tmp_path / "live", "old.example")
    (live / "old.example/privkey.new.csr").write_text("whose key has gone")
    vhosts = [
        {"sni": [f"{name}.example"], "certificate": tmp_path / f"{name}.crt"}
        for name in ("one", "two")
    ]
    tables = {
        "listen": [{"address": "127.0.0.1:1"}],
        "vhost": [{**one, "key": tmp_path / "both.key", "backend": "[::1]:1"} for one in vhosts],
    }
    configuration = tmp_path / "titus.toml"
    configuration.write_text(toml(tables))
    before = files(tmp_path)
    asked = ("one.example", "on.example", f"{live}/", f"{tmp_path}/")
    code, said, complaints = rekey("--config", configuration, *asked)
    assert (code, said) == (2, "")
    for expected in (
        "on.example: no virtual host takes this name, no certificate has it: did you mean "
        "one.example?",
        f"{tmp_path}/both.key is also the key of {tmp_path}/two.crt: give each certificate a key",
        f"{live}/old.example/privkey.new.csr is there, and its key is not: remove it",
        f"{tmp_path}: no certificates are in it",
    ):
        assert expected in complaints
    assert files(tmp_path) == before
    (code, _, complaints) = rekey("--config", tmp_path / "none.toml", "one.example")
    assert (code, "none.toml: no such file" in complaints) == (2, True)


#: Runs the command, and is killed before the change of this kind and number to the disk.
KILLED = """
import os, signal, sys
kind, left = sys.argv.pop(1), int(sys.argv.pop(1))
def count(event, arguments):
    global left
    if event == kind and "/live/" in str(arguments[0]):
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
from titus_py.__main__ import main
sys.addaudithook(count)
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("kind", "number", "there"),
    [
        ("os.link", 0, set()),
        ("os.link", 1, {"privkey.new.key"}),
        ("os.remove", 5, {"privkey.new.key", "privkey.new.csr"}),
    ],
)
def test_killed_while_it_makes_keys_and_run_again(
    company: Company, tmp_path: Path, kind: str, number: int, there: set[str]
) -> None:
    """Whenever that is, a request has its key, and the next run makes what is missing."""
    live = pairs(company, tmp_path / "live", "a.example")
    directory = live / "a.example"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, kind, str(number), "rekey", f"{live}/"], capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    new, request = directory / "privkey.new.key", directory / "privkey.new.csr"
    assert {path.name for path in (new, request) if path.exists()} == there
    made = new.read_bytes() if new.exists() else None
    if there == {"privkey.new.key"}:
        # Another kind would be another key.
        code, _, complaints = rekey("--kind=ed25519", f"{live}/")
        assert (code, request.exists()) == (1, False)
        assert complaints == (
            f"titus-py rekey: {new}: is a key of the kind p-256, and not ed25519\n"
        )
    code, _, complaints = rekey(f"{live}/")
    assert (code, complaints) == (0, "")
    # What was made is kept: its request may be on its way.
    assert made in (None, new.read_bytes())
    assert public_key_of(new) == openssl("req", "-in", request, "-noout", "-pubkey")
    assert {path.name for path in directory.iterdir()} == {
        *("fullchain.pem", "privkey.pem", "privkey.new.key", "privkey.new.csr")
    }


def test_killed_while_it_installs_and_run_again(company: Company, tmp_path: Path) -> None:
    """What it had put in place already is found to be."""
    live = pairs(company, tmp_path / "live", "a.example", "b.example")
    assert rekey(f"{live}/")[0] == 0
    for name in ("a", "b"):
        new = live / f"{name}.example/privkey.new"
        company.certify(Path(f"{new}.csr"), Path(f"{new}.crt"))
    wanted = {name: public_key(live / f"{name}.example/privkey.new.crt") for name in ("a", "b")}
    for number in (6, 20):
        command = ("rekey", "--install", f"{live}/")
        done = alone(sys.executable, "-c", KILLED, "os.rename", str(number), *command)
        assert done.returncode == -signal.SIGKILL, done.stderr
        for name in ("a", "b"):
            directory = live / f"{name}.example"
            assert public_key(directory / "fullchain.pem") == public_key_of(
                directory / "privkey.pem"
            )
    code, _, complaints = without_an_instance("--install", f"{live}/")
    assert code == 0, complaints
    for name in ("a", "b"):
        directory = live / f"{name}.example"
        assert public_key(directory / "fullchain.pem") == wanted[name]
        assert public_key_of(directory / "privkey.pem") == wanted[name]
        # The old pair is kept, perhaps twice.
        left = {re.sub(r"\.\d{8}T\d{6}Z(-\d)?\.", ".", path.name) for path in directory.iterdir()}
        assert left == {"fullchain.pem", "fullchain.pem.old", "privkey.pem", "privkey.pem.old"}


@pytest.mark.parametrize("loose", ["owner", "mode"])
def test_nothing_is_changed_where_another_user_could_have_root_follow_a_link(
    company: Company, tmp_path: Path, loose: str
) -> None:
    live = pairs(company, tmp_path / "live", "a.example")
    directory = live / "a.example"
    if loose == "owner":
        os.chown(directory, 12345, 0)
    else:
        directory.chmod(0o777)
    before = files(directory)
    for command in ([], ["--install"]):
        code, _, complaints = rekey(*command, f"{live}/")
        assert code == 2
        assert f"in {directory}" in complaints
        assert "chown root, chmod go-w" in complaints
    assert files(directory) == before


@pytest.mark.parametrize("linked", ["crt", "key"])
def test_a_link_in_the_place_of_a_new_file_is_named_before_anything_is_done(
    company: Company, tmp_path: Path, linked: str
) -> None:
    live = pairs(company, tmp_path / "live", "a.example")
    new = live / "a.example/privkey.new"
    for kind in ("crt", "key"):
        elsewhere = tmp_path / kind
        elsewhere.write_text("elsewhere")
        if kind == linked:
            new.with_name(f"privkey.new.{kind}").symlink_to(elsewhere)
        else:
            new.with_name(f"privkey.new.{kind}").write_text("here")
    before = files(tmp_path)
    code, _, complaints = without_an_instance("--install", "--dry-run", f"{live}/")
    assert code == 2
    said = f"{new}.{linked}: is a symbolic link: put the file itself there"
    assert said in complaints
    assert files(tmp_path) == before
