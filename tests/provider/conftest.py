"""Keys, certificates, builds of the provider, and keyd: made once, shared by its tests."""

import datetime
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from keyd.certificates import load_chain, refer_to
from keyd.powers import LibraryKey
from keyd.reference import reference_pem

from .support import (
    CFLAGS,
    LEAKS_LOOKED_FOR,
    PROGRAMS,
    SANITIZE,
    Harness,
    Keyd,
    Site,
    StartHarness,
    build,
    configure,
    harness,
    keyds_answer,
    preload_sanitizer,
    spki_hash,
)


@pytest.fixture(scope="session")
def provider_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The provider as it is shipped."""
    return build(tmp_path_factory.mktemp("plain") / "keyd.so", "-O2")


@pytest.fixture(scope="session")
def sanitized_provider_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The provider under AddressSanitizer and UndefinedBehaviorSanitizer."""
    return build(tmp_path_factory.mktemp("sanitized") / "keyd.so", *SANITIZE)


@pytest.fixture(scope="session")
def harness_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("harness") / "harness"
    source = str(PROGRAMS / "harness.c")
    command = ["gcc", *CFLAGS, *SANITIZE, "-o", str(output), source, "-lcrypto"]
    subprocess.run(command, check=True)
    return output


def _self_signed(key: LibraryKey) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.PEM)


@pytest.fixture(scope="session")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Site]:
    """One of each kind of key."""
    directory = tmp_path_factory.mktemp("sites")
    made: dict[str, Site] = {}

    def add(name: str, kind: str, signature_octets: int, reference: bytes) -> None:
        files = {end: directory / f"{name}.{end}" for end in ("crt", "key", "ref", "pub")}
        command = ["openssl", "x509", "-in", str(files["crt"]), "-pubkey", "-noout"]
        public = subprocess.run(command, check=True, capture_output=True).stdout
        files["pub"].write_bytes(public)
        files["ref"].write_bytes(reference)
        made[name] = Site(
            name,
            files["crt"],
            files["key"],
            files["ref"],
            files["pub"],
            spki_hash(public),
            kind,
            signature_octets,
        )

    keys: dict[str, tuple[LibraryKey, str, int]] = {
        "rsa": (rsa.generate_private_key(65537, 2048), "RSA", 256),
        "p256": (ec.generate_private_key(ec.SECP256R1()), "EC", 72),
        "p384": (ec.generate_private_key(ec.SECP384R1()), "EC", 104),
        "p521": (ec.generate_private_key(ec.SECP521R1()), "EC", 139),
        "ed25519": (ed25519.Ed25519PrivateKey.generate(), "ED25519", 64),
    }
    for name, (key, kind, signature_octets) in keys.items():
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (directory / f"{name}.key").write_bytes(pem)
        (directory / f"{name}.crt").write_bytes(_self_signed(key))
        add(name, kind, signature_octets, reference_pem(key.public_key()))
    # cryptography has no certificates with an id-RSASSA-PSS key, OpenSSL has.
    command = "openssl req -x509 -newkey rsa-pss -pkeyopt rsa_keygen_bits:3072 -nodes"
    options = ["-subj", "/CN=localhost", "-keyout", "rsa-pss.key", "-out", "rsa-pss.crt"]
    subprocess.run([*command.split(), *options], check=True, cwd=directory, capture_output=True)
    path = str(directory / "rsa-pss.crt")
    _, reference = refer_to(load_chain(path)[0].certificate, path)
    add("rsa-pss", "RSA-PSS", 384, reference.encode())
    return made


@pytest.fixture(scope="package")
def keyd(tmp_path_factory: pytest.TempPathFactory, sites: dict[str, Site]) -> Iterator[Keyd]:
    """One that answers as keyd does."""
    running = Keyd(tmp_path_factory.mktemp("keyd") / "keyd.sock", keyds_answer(sites.values()))
    yield running
    running.close()


@pytest.fixture
def bad_keyd(tmp_path: Path) -> Iterator[Keyd]:
    """One that a test tells what to answer."""
    running = Keyd(tmp_path / "bad.sock")
    yield running
    running.close()


@pytest.fixture
def start_harness(
    tmp_path: Path, harness_path: Path, sanitized_provider_path: Path
) -> StartHarness:
    """Start harness.c with these settings of the provider."""

    def start(
        *settings: str, pass_fds: tuple[int, ...] = (), run_by: tuple[str, ...] = ()
    ) -> AbstractContextManager[Harness]:
        configuration = configure(tmp_path / "openssl.cnf", sanitized_provider_path, *settings)
        report = tmp_path / "harness.txt"
        command = [*run_by, str(harness_path)]
        return harness(command, configuration, report, pass_fds, **LEAKS_LOOKED_FOR)

    return start


@pytest.fixture
def python_harness(
    tmp_path: Path, sanitized_provider_path: Path, sanitizer_preloaded: dict[str, str]
) -> Iterator[Harness]:
    """harness.py, for the OpenSSL that ``cryptography`` brings."""
    configuration = configure(tmp_path / "python.cnf", sanitized_provider_path)
    command = [sys.executable, str(PROGRAMS / "harness.py")]
    report = tmp_path / "python.txt"
    with harness(command, configuration, report, (), **sanitizer_preloaded) as running:
        yield running


@pytest.fixture(scope="session")
def sanitizer_preloaded() -> dict[str, str]:
    return preload_sanitizer()
