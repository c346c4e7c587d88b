"""Certificates for keys of rarer kinds: served by titus-py."""

import datetime
import re
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from OpenSSL import SSL

from keyd.mldsa import KEY_TYPES

from .conftest import Certificates, Serve
from .peers import Listener, TlsClient
from .service import edit, problems, serves, talk

BOUND = ["rsa_pss_keygen_md:sha384", "rsa_pss_keygen_mgf1_md:sha384", "rsa_pss_keygen_saltlen:48"]


def make(directory: Path, *parameters: str) -> dict[str, str]:
    """A self-signed certificate for an RSA key that is bound to PSS, as [[vhost]] names it."""
    files = {"certificate": str(directory / "site.crt"), "key": str(directory / "site.key")}
    options = [word for one in ("rsa_keygen_bits:2048", *parameters) for word in ("-pkeyopt", one)]
    command = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=localhost", "-newkey", "rsa-pss"]
    names = ["-addext", "subjectAltName=DNS:localhost"]
    paths = ["-keyout", files["key"], "-out", files["certificate"]]
    subprocess.run([*command, *options, *names, *paths], check=True, capture_output=True)
    return files


def encrypt(files: dict[str, str]) -> None:
    """Put an encrypted key in the place of the one that is there."""
    path = Path(files["key"])
    files["passphrase_file"] = str(path.with_name("passphrase"))
    Path(files["passphrase_file"]).write_text("a passphrase\n")
    files["key"] = str(path.with_name("encrypted.key"))
    command = ["openssl", "pkey", "-aes256", "-in", path, "-out", files["key"]]
    command += ["-passout", f"file:{files['passphrase_file']}"]
    subprocess.run(command, check=True, capture_output=True)
    path.unlink()


@pytest.mark.parametrize(
    ("parameters", "digest", "encrypted"), [([], "SHA256", False), (BOUND, "SHA384", True)]
)
def test_a_key_that_is_bound_to_pss(
    serve: Serve,
    echoing: Listener,
    tmp_path: Path,
    parameters: list[str],
    digest: str,
    encrypted: bool,
) -> None:
    """It signs with the first digest that the client offers and the key is not kept from."""
    files = make(tmp_path, *parameters)
    if encrypted:
        encrypt(files)
    instance = serve(echoing.address, vhost=[files])
    command = ["openssl", "s_client", "-connect", f"localhost:{instance.port}"]
    verified = ["-CAfile", files["certificate"], "-verify_return_error"]
    schemes = ["-sigalgs", "rsa_pss_pss_sha256:rsa_pss_pss_sha384:RSA-PSS+SHA384:RSA-PSS+SHA256"]
    for version in ("-tls1_2", "-tls1_3"):
        words = [*command, version, *verified, *schemes]
        done = subprocess.run(words, input=b"", capture_output=True, timeout=240, check=False)
        assert done.returncode == 0, (version, done.stderr)
        assert f"Peer signing digest: {digest}".encode() in done.stdout, version
        # OpenSSL has other words for it since 3.5.
        assert re.search(rb"(?i)peer signature type: rsa.pss", done.stdout), version


def make_mldsa(directory: Path, parameter_set: str) -> dict[str, str]:
    """A self-signed certificate for an ML-DSA key, by openssl(1) where that knows them."""
    files = {"certificate": str(directory / "site.crt"), "key": str(directory / "site.key")}
    command = [
        "openssl",
        "req",
        "-x509",
        "-nodes",
        "-newkey",
        parameter_set,
        "-subj",
        "/CN=localhost",
    ]
    names = ["-addext", "subjectAltName=DNS:localhost"]
    paths = ["-keyout", files["key"], "-out", files["certificate"]]
    if subprocess.run([*command, *names, *paths], capture_output=True, check=False).returncode == 0:
        return files
    # Debian 12's.
    private_type, _ = KEY_TYPES[parameter_set]
    key = private_type.generate()  # type: ignore[attr-defined]
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, None)
    )
    Path(files["certificate"]).write_bytes(certificate.public_bytes(Encoding.PEM))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    Path(files["key"]).write_bytes(pem)
    return files


@pytest.mark.parametrize("parameter_set", ["ML-DSA-44", "ML-DSA-65", "ML-DSA-87"])
def test_an_ml_dsa_key_beside_one_of_another_kind(
    serve: Serve,
    echoing: Listener,
    certificates: Certificates,
    tmp_path: Path,
    parameter_set: str,
) -> None:
    """Who knows ML-DSA is shown that certificate, and whoever speaks TLS 1.2 the other one."""
    post_quantum, usual = make_mldsa(tmp_path, parameter_set), certificates("P-256")
    other = {"certificate": usual.certificate, "key": usual.key}
    instance = serve(echoing.address, vhost=[{"certificates": [post_quantum, other]}])
    with TlsClient(instance.port, authority=Path(post_quantum["certificate"])) as client:
        assert talk(client.handshake())
        shown = client.tls.get_peer_certificate(as_cryptography=True)
        assert isinstance(shown.public_key(), KEY_TYPES[parameter_set][1])
    versions = SSL.TLS1_2_VERSION, SSL.TLS1_2_VERSION
    with TlsClient(instance.port, authority=usual.authority, versions=versions) as client:
        assert talk(client.handshake())


def test_an_ml_dsa_key_alone_takes_tls_1_3(serve: Serve, echoing: Listener, tmp_path: Path) -> None:
    files = make_mldsa(tmp_path, "ML-DSA-65")
    instance = serve(echoing.address, vhost=[{**files, "min_version": "TLSv1.3"}])
    assert serves(instance)
    edit(instance, lambda tables: tables["vhost"][0].pop("min_version"))
    assert any(
        "min_version: for a key of ML-DSA-65, TLS 1.2 has none: set min_version to TLSv1.3" in one
        for one in problems(instance)
    )
