"""Client certificates, by the openssl command and curl: who is let in, and what others are told."""

import itertools
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from titus_py.supervisor.control_client import ask

from .client_authority import DAY, ClientAuthority, ClientCertificate
from .conftest import Certificates, Nginx, Serve
from .instance import TITUS_PY, Event, Instance, eventually
from .peers import Listener, TlsClient, served_by

VERSIONS = ("1.2", "1.3")
#: Where each client comes from, so that its events are known by it.
_SOURCES = itertools.count(1)


class Told(NamedTuple):
    """What a client got, and what the log says of it."""

    answer: bytes
    alert: int | None
    event: Event


def greet(connection: Any) -> None:
    with suppress(OSError):
        connection.recv(64)
        connection.sendall(b"welcome\n")


@pytest.fixture(scope="module")
def greeting() -> Iterator[Listener]:
    with Listener.tcp() as listener, served_by(listener, greet):
        yield listener


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> ClientAuthority:
    return ClientAuthority(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def revoked(authority: ClientAuthority) -> ClientCertificate:
    return authority.issue("mallory")


@pytest.fixture(scope="module")
def strict(
    serve_all: Serve, greeting: Listener, authority: ClientAuthority, revoked: ClientCertificate
) -> Instance:
    """Requires a certificate of the authority's, for a name below example.org."""
    vhost = {
        "client_certificates": "required",
        "client_ca": authority.file,
        "client_crl": authority.crl(revoked),
        "client_allow": {"dns": ["*.example.org"], "uri": ["spiffe://example.org/**"]},
    }
    return serve_all(greeting.address, vhost=[vhost])


def connect(instance: Instance, version: str, *options: str) -> Told:
    """Connect as ``openssl s_client`` does, from an address of its own."""
    number = next(_SOURCES)
    source = f"127.9.{number // 250}.{number % 250 + 1}"
    command = [
        "openssl", "s_client", "-connect", f"127.0.0.1:{instance.port}", "-bind", f"{source}:0",
        "-servername", "localhost", "-quiet", f"-tls{version.replace('.', '_')}", *options,
    ]  # fmt: skip
    done = subprocess.run(command, input=b"hello\n", capture_output=True, timeout=20, check=False)
    alert = re.search(rb"SSL alert number (\d+)", done.stderr)

    def ended() -> Event | None:
        ends = ("connection_ended", "handshake_failed")
        events = [event for event in instance.events() if event["event"] in ends]
        return next((one for one in events if one["client"].startswith(f"{source}:")), None)

    event = eventually(ended, f"the end of {source}")
    return Told(done.stdout, int(alert[1]) if alert else None, event)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_good_certificate_is_let_in(
    strict: Instance, authority: ClientAuthority, version: str
) -> None:
    for client in (
        authority.issue("alice"),
        authority.issue("service", dns=(), uri=("spiffe://example.org/ns/web",)),
    ):
        told = connect(strict, version, *client.options)
        assert (told.answer, told.alert) == (b"welcome\n", None)
        assert told.event["event"] == "connection_ended"
        _names_it(told.event, client)


def _names_it(event: Event, client: ClientCertificate) -> None:
    """That the log names this certificate."""
    certificate = client.certificate
    assert event["certificate_subject"] == certificate.subject.rfc4514_string()
    assert event["certificate_issuer"] == certificate.issuer.rfc4514_string()
    assert event["certificate_serial"] == f"{certificate.serial_number:x}"
    assert event["certificate_spki"] == client.spki


def _chain(authority: ClientAuthority, length: int, directory: Path) -> ClientCertificate:
    """A certificate with so many others between it and the authority."""
    for number in range(length):
        authority = ClientAuthority(directory, f"between {number}", above=authority)
    return authority.issue()


def _forged(authority: ClientAuthority) -> ClientCertificate:
    """One of which an octet of the signature is another."""
    good = authority.issue()
    der = bytearray(good.certificate.public_bytes(Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_certificate(bytes(der))
    good.chain.write_bytes(forged.public_bytes(Encoding.PEM))
    return good._replace(certificate=forged)


#: What is wrong: the alert (RFC 8446 §6.2), and the reason in the log.
BAD: dict[str, tuple[Callable[[ClientAuthority, Path], ClientCertificate], int, str]] = {
    "expired": (lambda a, _: a.issue(ends=-DAY / 24), 45, "expired"),
    "not yet valid": (lambda a, _: a.issue(begins=DAY), 45, "not_yet_valid"),
    "foreign": (lambda _, path: ClientAuthority(path, "foreign").issue(), 48, "unknown_ca"),
    "self-signed": (lambda a, _: a.issue(self_signed=True), 48, "unknown_ca"),
    "for servers": (lambda a, _: a.issue(usage=ExtendedKeyUsageOID.SERVER_AUTH), 43, "wrong_usage"),
    "chain too long": (lambda a, path: _chain(a, 6, path), 48, "chain_too_long"),
    "forged": (lambda a, _: _forged(a), 42, "bad_signature"),
    "another name": (lambda a, _: a.issue(dns=("alice.example.com",)), 42, "not_allowed"),
    "a name below": (lambda a, _: a.issue(dns=("a.b.example.org",)), 42, "not_allowed"),
    "no name": (lambda a, _: a.issue("a.example.org", dns=()), 42, "not_allowed"),
    "110 KB": (lambda a, _: a.issue(padding=110_000), 47, "too_long"),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("wrong", BAD)
def test_a_bad_certificate_is_refused(
    strict: Instance, authority: ClientAuthority, tmp_path: Path, wrong: str, version: str
) -> None:
    issue, alert, reason = BAD[wrong]
    client = issue(authority, tmp_path)
    told = connect(strict, version, *client.options)
    assert (told.answer, told.alert) == (b"", alert)
    assert (told.event["event"], told.event["end"]) == ("handshake_failed", "client_certificate")
    assert told.event["detail"].partition(":")[0] == reason
    if wrong != "110 KB":
        # OpenSSL does not read a longer one.
        _names_it(told.event, client)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_revoked_certificate_is_refused(
    strict: Instance, revoked: ClientCertificate, version: str
) -> None:
    told = connect(strict, version, *revoked.options)
    assert (told.answer, told.alert) == (b"", 44)
    assert told.event["detail"] == "revoked: certificate revoked"
    _names_it(told.event, revoked)


@pytest.mark.parametrize(("version", "alert"), [("1.2", 40), ("1.3", 116)])
def test_no_certificate_is_refused(strict: Instance, version: str, alert: int) -> None:
    """handshake_failure (RFC 5246 §7.4.6), certificate_required (RFC 8446 §6.2)."""
    told = connect(strict, version)
    assert (told.answer, told.alert) == (b"", alert)
    assert told.event["end"] == "client_certificate"
    assert told.event["detail"].startswith("no_certificate")
    assert "certificate_subject" not in told.event


def test_a_large_certificate_is_read(strict: Instance, authority: ClientAuthority) -> None:
    client = authority.issue(padding=90_000)
    told = connect(strict, "1.3", *client.options)
    assert told.answer == b"welcome\n"


def test_a_long_name_is_logged_as_far_as_there_is_room(
    strict: Instance, authority: ClientAuthority
) -> None:
    names = [f"{number}.example.org" for number in range(2000)]
    told = connect(strict, "1.3", *authority.issue("x" * 64, dns=names).options)
    assert told.answer == b"welcome\n"
    assert told.event["certificate_subject"].startswith("CN=xxx")


def test_others_are_not_affected(
    strict: Instance, authority: ClientAuthority, tmp_path: Path
) -> None:
    client = authority.issue()
    with TlsClient(strict.port, certificate=(client.chain, client.key)) as other:
        other.handshake()
        for wrong in ("110 KB", "foreign", "forged"):
            issue, alert, _ = BAD[wrong]
            (tmp_path / wrong).mkdir()
            assert (
                connect(strict, "1.3", *issue(authority, tmp_path / wrong).options).alert == alert
            )
        other.send(b"hello")
        assert other.receive_all() == b"welcome\n"


def test_refusals_are_counted_by_reason(strict: Instance) -> None:
    connect(strict, "1.3")
    counts = ask(strict.pid, {"do": "status"}, 10)["counts"]
    assert counts["failed"]["client_certificate"] >= 1


def test_an_expired_list_refuses_everybody(
    serve: Serve, greeting: Listener, tmp_path: Path
) -> None:
    """certificate_unknown: the client's certificate may be good, and ours to judge is the list."""
    authority = ClientAuthority(tmp_path)
    vhost = {
        "client_certificates": "optional",
        "client_ca": authority.file,
        "client_crl": authority.crl(ends=-DAY),
        "client_allow": "all",
    }
    instance = serve(greeting.address, vhost=[vhost])
    assert "expired on" in instance.wait_for_event("configuration")["problem"]
    for version in VERSIONS:
        told = connect(instance, version, *authority.issue().options)
        assert (told.answer, told.alert) == (b"", 46)
        assert told.event["detail"] == "crl_expired: CRL has expired"
        assert connect(instance, version).answer == b"welcome\n"


def test_optional_lets_in_without_one_and_refuses_a_bad_one(
    serve: Serve, greeting: Listener, authority: ClientAuthority, tmp_path: Path
) -> None:
    vhost = {
        "client_certificates": "optional",
        "client_ca": authority.file,
        "client_allow": {"cn": ["alice"]},
    }
    instance = serve(greeting.address, vhost=[vhost])
    for version in VERSIONS:
        told = connect(instance, version)
        assert told.answer == b"welcome\n"
        assert "certificate_subject" not in told.event
        assert connect(instance, version, *authority.issue("alice").options).answer == b"welcome\n"
        assert connect(instance, version, *authority.issue("bob").options).alert == 42
        foreign = ClientAuthority(tmp_path / version, "foreign").issue("alice")
        assert connect(instance, version, *foreign.options).alert == 48


def test_known_keys_need_no_authority(
    serve: Serve, greeting: Listener, authority: ClientAuthority
) -> None:
    """Whoever has the key can write what they like around it, and it counts for nothing."""
    known = [
        authority.issue(self_signed=True),
        authority.issue(),
        authority.issue(self_signed=True, ends=-DAY / 24, usage=ExtendedKeyUsageOID.SERVER_AUTH),
    ]
    vhost = {
        "client_certificates": "required",
        "client_allow": {"spki": [client.spki for client in known]},
    }
    instance = serve(greeting.address, vhost=[vhost])
    for version in VERSIONS:
        for client in known:
            told = connect(instance, version, *client.options)
            assert told.answer == b"welcome\n"
            _names_it(told.event, client)
        other = authority.issue(self_signed=True)
        told = connect(instance, version, *other.options)
        assert (told.answer, told.alert) == (b"", 42)
        assert told.event["detail"] == "unknown_key"
        _names_it(told.event, other)


def test_an_authority_between_is_enough(
    serve: Serve, greeting: Listener, authority: ClientAuthority, tmp_path: Path
) -> None:
    """Each certificate of the file is trusted; what its issuer has issued besides is not."""
    between = ClientAuthority(tmp_path, "between", above=authority)
    vhost = {
        "client_certificates": "required",
        "client_ca": between.file,
        "client_allow": "all",
    }
    instance = serve(greeting.address, vhost=[vhost])
    assert connect(instance, "1.3", *between.issue().options).answer == b"welcome\n"
    assert connect(instance, "1.3", *authority.issue().options).alert == 48


def test_hosts_with_a_directory_of_certificates_ask_as_well(
    serve: Serve,
    greeting: Listener,
    certificates: Certificates,
    authority: ClientAuthority,
    tmp_path: Path,
) -> None:
    """Their contexts get their certificates late, in the worker."""
    site = tmp_path / "live" / "localhost"
    site.mkdir(parents=True)
    issued = certificates()
    (site / "fullchain.pem").symlink_to(issued.certificate)
    (site / "privkey.pem").symlink_to(issued.key)
    vhost = {
        "certificate_dir": site.parent,
        "client_certificates": "required",
        "client_ca": authority.file,
        "client_allow": "all",
    }
    instance = serve(greeting.address, vhost=[vhost])
    for version, alert in (("1.2", 40), ("1.3", 116)):
        assert connect(instance, version).alert == alert
        assert connect(instance, version, *authority.issue().options).answer == b"welcome\n"


@pytest.mark.parametrize("version", VERSIONS)
def test_curl(
    serve: Serve,
    nginx: Nginx,
    certificates: Certificates,
    authority: ClientAuthority,
    version: str,
) -> None:
    vhost = {
        "client_certificates": "required",
        "client_ca": authority.file,
        "client_allow": {"dns": ["alice.example.org"]},
    }
    instance = serve(nginx.address, vhost=[vhost])
    client = authority.issue("alice")
    command = [
        "curl", "--silent", "--show-error", "--noproxy", "*", "--http1.1",
        "--cacert", str(certificates().authority),
        "--resolve", f"localhost:{instance.port}:127.0.0.1",
        "--tlsv1.3" if version == "1.3" else "--tls-max", *([] if version == "1.3" else ["1.2"]),
    ]  # fmt: skip
    url = f"https://localhost:{instance.port}/"
    shown = ["--cert", str(client.chain), "--key", str(client.key)]
    good = subprocess.run([*command, *shown, url], capture_output=True, timeout=20, check=False)
    assert good.returncode == 0, good.stderr
    none = subprocess.run([*command, url], capture_output=True, timeout=20, check=False)
    assert none.returncode != 0
    assert b"alert" in none.stderr


def test_only_who_asks_pays(strict: Instance, serve: Serve, greeting: Listener) -> None:
    """The code is in the workers of who asks, none of it writable; and in nobody else's."""
    for instance, asks in ((strict, True), (serve(greeting.address), False)):
        for worker in instance.workers():
            maps = Path(f"/proc/{worker.pid}/maps").read_text()
            assert ("verification." in maps) is asks
            assert not re.search(r"^\S+ \S?wx", maps, re.MULTILINE)


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_an_audit_has_no_certificate_and_blames_nobody_for_it(
    serve: Serve, greeting: Listener, authority: ClientAuthority, version: str
) -> None:
    """It looks at what it can; where there is a host that lets it in, it looks there."""
    requires = {
        "client_certificates": "required",
        "client_ca": authority.file,
        "client_allow": "all",
        "max_version": version,
    }
    hosts = [requires] if version == "TLSv1.2" else [{"sni": ["a.example.org"], **requires}, {}]
    instance = serve(greeting.address, vhost=hosts)
    command = [str(TITUS_PY), "audit", "--pid", str(instance.pid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("requires a client" in done.stdout) is (version == "TLSv1.2")
