"""Client certificates, by the openssl command and curl: who is let in, and what others are told."""

import itertools
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from titus_py.supervisor.control_client import ask

from .client_authority import DAY, ClientAuthority, ClientCertificate
from .conftest import Certificates, Serve
from .instance import TITUS_PY, Event, Instance, eventually, of_each
from .peers import Listener, TlsClient, served_by

VERSIONS = ("1.2", "1.3")
#: Where each client comes from, so that its events are known by it.
_SOURCES = itertools.count(1)


class Told(NamedTuple):
    """What a client got, and what the log says of it."""

    answer: bytes
    alert: int | None
    event: Event


WELCOME = b"HTTP/1.0 200 OK\r\n\r\nwelcome\n"


def greet(connection: Any) -> None:
    with suppress(OSError):
        connection.recv(65536)
        connection.sendall(WELCOME)


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
def known(authority: ClientAuthority) -> list[ClientCertificate]:
    """Whose keys are known: self-signed; of an authority; expired, and for servers."""
    return [
        authority.issue(self_signed=True),
        authority.issue(),
        authority.issue(self_signed=True, ends=-DAY / 24, usage=ExtendedKeyUsageOID.SERVER_AUTH),
    ]


@pytest.fixture(scope="module")
def between(
    authority: ClientAuthority, tmp_path_factory: pytest.TempPathFactory
) -> ClientAuthority:
    return ClientAuthority(tmp_path_factory.mktemp("between"), "between", above=authority)


@pytest.fixture(scope="module")
def instance(
    serve_all: Serve,
    greeting: Listener,
    certificates: Certificates,
    authority: ClientAuthority,
    revoked: ClientCertificate,
    known: list[ClientCertificate],
    between: ClientAuthority,
    tmp_path_factory: pytest.TempPathFactory,
) -> Instance:
    """A virtual host for each way to ask; ``localhost`` is strict."""
    live = tmp_path_factory.mktemp("live")
    site = certificates("P-256", "directory.test")
    (live / "directory.test").mkdir()
    (live / "directory.test" / "fullchain.pem").symlink_to(site.certificate)
    (live / "directory.test" / "privkey.pem").symlink_to(site.key)
    required = {"client_certificates": "required", "client_ca": authority.file}
    optional = {"client_certificates": "optional", "client_ca": authority.file}
    hosts: dict[str, dict[str, Any]] = {
        "localhost": {
            **required,
            "client_crl": authority.crl(revoked),
            "client_allow": {"dns": ["*.example.org"], "uri": ["spiffe://example.org/**"]},
        },
        "optional.test": {**optional, "client_allow": {"cn": ["alice"]}},
        "old-list.test": {
            **optional,
            "client_crl": authority.crl(ends=-DAY, name="old.crl"),
            "client_allow": "all",
        },
        "keys.test": {
            "client_certificates": "required",
            "client_allow": {"spki": [client.spki for client in known]},
        },
        "between.test": {**required, "client_ca": between.file, "client_allow": "all"},
    }
    vhosts = [{"sni": [name], **host} for name, host in hosts.items()]
    vhosts.append({"certificate_dir": live, **required, "client_allow": "all"})
    return serve_all(greeting.address, vhost=vhosts)


def connect(instance: Instance, version: str, *options: str, name: str = "localhost") -> Told:
    """Connect as ``openssl s_client`` does, from an address of its own."""
    number = next(_SOURCES)
    source = f"127.9.{number // 250}.{number % 250 + 1}"
    command = [
        "openssl", "s_client", "-connect", f"127.0.0.1:{instance.port}", "-bind", f"{source}:0",
        "-servername", name, "-quiet", f"-tls{version.replace('.', '_')}", *options,
    ]  # fmt: skip
    done = subprocess.run(command, input=b"hello\n", capture_output=True, timeout=240, check=False)
    alert = re.search(rb"SSL alert number (\d+)", done.stderr)

    def ended() -> Event | None:
        ends = ("connection_ended", "handshake_failed")
        events = [event for event in instance.events() if event["event"] in ends]
        return next((one for one in events if one["client"].startswith(f"{source}:")), None)

    event = eventually(ended, f"the end of {source}")
    return Told(done.stdout, int(alert[1]) if alert else None, event)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_good_certificate_is_let_in(
    instance: Instance, authority: ClientAuthority, version: str
) -> None:
    for client in (
        authority.issue("alice"),
        authority.issue("service", dns=(), uri=("spiffe://example.org/ns/web",)),
    ):
        told = connect(instance, version, *client.options)
        assert (told.answer, told.alert) == (WELCOME, None)
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
    "by another client": (
        lambda a, path: ClientAuthority(path, "client", above=a, may_issue=False).issue(),
        48,
        "unknown_ca",
    ),
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
    instance: Instance, authority: ClientAuthority, tmp_path: Path, wrong: str, version: str
) -> None:
    issue, alert, reason = BAD[wrong]
    client = issue(authority, tmp_path)
    told = connect(instance, version, *client.options)
    assert (told.answer, told.alert) == (b"", alert)
    assert (told.event["event"], told.event["end"]) == ("handshake_failed", "client_certificate")
    assert told.event["detail"].partition(":")[0] == reason
    if wrong != "110 KB":
        # OpenSSL does not read a longer one.
        _names_it(told.event, client)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_revoked_certificate_is_refused(
    instance: Instance, revoked: ClientCertificate, version: str
) -> None:
    told = connect(instance, version, *revoked.options)
    assert (told.answer, told.alert) == (b"", 44)
    assert told.event["detail"] == "revoked: certificate revoked"
    _names_it(told.event, revoked)


@pytest.mark.parametrize(("version", "alert"), [("1.2", 40), ("1.3", 116)])
def test_no_certificate_is_refused(instance: Instance, version: str, alert: int) -> None:
    """handshake_failure (RFC 5246 §7.4.6), certificate_required (RFC 8446 §6.2)."""
    told = connect(instance, version)
    assert (told.answer, told.alert) == (b"", alert)
    assert told.event["end"] == "client_certificate"
    assert told.event["detail"].startswith("no_certificate")
    assert "certificate_subject" not in told.event


def test_a_large_certificate_is_read(instance: Instance, authority: ClientAuthority) -> None:
    client = authority.issue(padding=90_000)
    told = connect(instance, "1.3", *client.options)
    assert told.answer == WELCOME


def test_a_long_name_is_logged_as_far_as_there_is_room(
    instance: Instance, authority: ClientAuthority
) -> None:
    names = [f"{number}.example.org" for number in range(2000)]
    told = connect(instance, "1.3", *authority.issue("x" * 64, dns=names).options)
    assert told.answer == WELCOME
    assert told.event["certificate_subject"].startswith("CN=xxx")


def test_others_are_not_affected(
    instance: Instance, authority: ClientAuthority, tmp_path: Path
) -> None:
    client = authority.issue()
    with TlsClient(instance.port, certificate=(client.chain, client.key)) as other:
        other.handshake()
        for wrong in ("110 KB", "foreign", "forged"):
            issue, alert, _ = BAD[wrong]
            (tmp_path / wrong).mkdir()
            assert (
                connect(instance, "1.3", *issue(authority, tmp_path / wrong).options).alert == alert
            )
        other.send(b"hello")
        assert other.receive_all() == WELCOME


def test_refusals_are_counted_by_reason(instance: Instance) -> None:
    connect(instance, "1.3")

    def failed() -> dict[str, int]:
        return cast(dict[str, int], ask(instance.pid, {"do": "status"}, 60)["counts"]["failed"])

    eventually(lambda: failed().get("client_certificate", 0) >= 1, "the refusal is counted")


@pytest.mark.parametrize("version", VERSIONS)
def test_an_expired_list_refuses_everybody(
    instance: Instance, authority: ClientAuthority, version: str
) -> None:
    """certificate_unknown: the client's certificate may be good, and it is our list that is not."""
    warnings = [event["problem"] for event in instance.events_named("configuration")]
    (warning,) = (text for text in warnings if "old.crl: the list of" in text)
    assert "expired on" in warning
    told = connect(instance, version, *authority.issue().options, name="old-list.test")
    assert (told.answer, told.alert) == (b"", 46)
    assert told.event["detail"] == "crl_expired: CRL has expired"
    assert connect(instance, version, name="old-list.test").answer == WELCOME


@pytest.mark.parametrize("version", VERSIONS)
def test_optional_lets_in_without_one_and_refuses_a_bad_one(
    instance: Instance, authority: ClientAuthority, tmp_path: Path, version: str
) -> None:
    def try_it(*options: str) -> Told:
        return connect(instance, version, *options, name="optional.test")

    told = try_it()
    assert told.answer == WELCOME
    assert "certificate_subject" not in told.event
    assert try_it(*authority.issue("alice").options).answer == WELCOME
    assert try_it(*authority.issue("bob").options).alert == 42
    foreign = ClientAuthority(tmp_path, "foreign").issue("alice")
    assert try_it(*foreign.options).alert == 48


@pytest.mark.parametrize("version", VERSIONS)
def test_known_keys_need_no_authority(
    instance: Instance, authority: ClientAuthority, known: list[ClientCertificate], version: str
) -> None:
    """Whoever has the key can write what they like around it, and it counts for nothing."""
    for client in known:
        told = connect(instance, version, *client.options, name="keys.test")
        assert told.answer == WELCOME
        _names_it(told.event, client)
    other = authority.issue(self_signed=True)
    told = connect(instance, version, *other.options, name="keys.test")
    assert (told.answer, told.alert) == (b"", 42)
    assert told.event["detail"] == "unknown_key"
    _names_it(told.event, other)


def test_an_authority_between_is_enough(
    instance: Instance, authority: ClientAuthority, between: ClientAuthority
) -> None:
    """Each certificate of the file is trusted; what its issuer has issued besides is not."""
    good = connect(instance, "1.3", *between.issue().options, name="between.test")
    assert good.answer == WELCOME
    assert connect(instance, "1.3", *authority.issue().options, name="between.test").alert == 48


@pytest.mark.parametrize(("version", "alert"), [("1.2", 40), ("1.3", 116)])
def test_hosts_with_a_directory_of_certificates_ask_as_well(
    instance: Instance, authority: ClientAuthority, version: str, alert: int
) -> None:
    """Their contexts get their certificates late, in the worker."""
    assert connect(instance, version, name="directory.test").alert == alert
    good = connect(instance, version, *authority.issue().options, name="directory.test")
    assert good.answer == WELCOME


@pytest.mark.parametrize("version", ["--tlsv1.3", "--tls-max=1.2"])
def test_curl(
    instance: Instance, certificates: Certificates, authority: ClientAuthority, version: str
) -> None:
    client = authority.issue("alice")
    command = [
        "curl", "--silent", "--show-error", "--noproxy", "*",
        "--cacert", str(certificates().authority),
        "--resolve", f"localhost:{instance.port}:127.0.0.1",
        *version.split("="), f"https://localhost:{instance.port}/",
    ]  # fmt: skip
    shown = ["--cert", str(client.chain), "--key", str(client.key)]
    good = subprocess.run([*command, *shown], capture_output=True, timeout=240, check=False)
    assert (good.returncode, good.stdout) == (0, b"welcome\n"), good.stderr
    none = subprocess.run(command, capture_output=True, timeout=240, check=False)
    assert none.returncode != 0
    assert b"alert" in none.stderr


def test_only_who_asks_pays(instance: Instance, serve: Serve, greeting: Listener) -> None:
    """The code is in the workers of who asks, none of it writable; and in nobody else's."""
    for one, asks in ((instance, True), (serve(greeting.address), False)):
        # One that has just served may end meanwhile: then it has no memory.
        found = [maps for maps in of_each(one.confined_workers(2), "maps").values() if maps]
        assert len(found) >= 2
        for maps in found:
            assert (b"verification." in maps) is asks
            assert not re.search(rb"^\S+ \S?wx", maps, re.MULTILINE)


def audit(instance: Instance) -> str:
    command = [str(TITUS_PY), "audit", "--pid", str(instance.pid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_audit_looks_where_it_needs_no_certificate(instance: Instance) -> None:
    assert "requires a client" not in audit(instance)


def test_an_audit_has_no_certificate_and_blames_nobody_for_it(
    serve: Serve, greeting: Listener, authority: ClientAuthority
) -> None:
    vhost = {
        "client_certificates": "required",
        "client_ca": authority.file,
        "client_allow": "all",
        "max_version": "TLSv1.2",
    }
    assert "requires a client" in audit(serve(greeting.address, vhost=[vhost]))


@pytest.fixture(scope="module")
def strange(
    authority: ClientAuthority, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """Certificates that are not quite as RFC 5280 has them, as the options to show them."""
    directory = tmp_path_factory.mktemp("strange")
    shown = {}
    for name, serial in {"zero": "0", "negative": "-5"}.items():
        key, certificate = directory / f"{name}.key", directory / f"{name}.crt"
        command = [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-keyout", str(key), "-out", str(certificate), "-subj", "/CN=alice",
            "-set_serial", serial,
        ]  # fmt: skip
        subprocess.run(command, capture_output=True, timeout=240, check=True)
        shown[name] = ["-cert", str(certificate), "-key", str(key)]
    with pytest.warns(UserWarning, match="length must be"):
        shown["long"] = authority.issue("a" * 70).options
    return shown


@pytest.mark.parametrize("name", ["zero", "negative"])
def test_a_certificate_that_the_library_warns_of(
    instance: Instance, strange: dict[str, list[str]], name: str
) -> None:
    """For a warning, Python reads source files, and a worker that tried that would be killed."""
    told = connect(instance, "1.3", *strange[name])
    assert (told.event["end"], told.event["level"]) == ("client_certificate", "info")
    assert told.event["detail"].startswith("unknown_ca: ")


def test_a_common_name_that_is_longer_than_names_should_be(
    instance: Instance, strange: dict[str, list[str]]
) -> None:
    assert connect(instance, "1.3", *strange["long"]).answer == WELCOME
