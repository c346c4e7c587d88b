"""Keys that are bound to PSS: known by what OpenSSL writes, and written in the same way."""

import base64
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from keyd.certificates import load_chain, refer_to
from keyd.der import SEQUENCE, tlv
from keyd.key_kind import beginning
from keyd.keys import UnusableKey, as_bound, load_private_key
from keyd.pss import PSSPrivateKey, binding_of_key
from keyd.reference import key_id


def make(directory: Path, *parameters: str) -> tuple[Path, Path]:
    """A key and its certificate, by openssl(1)."""
    key, certificate = directory / "site.key", directory / "site.crt"
    options = [word for one in parameters for word in ("-pkeyopt", f"rsa_pss_keygen_{one}")]
    command = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=localhost", "-newkey", "rsa-pss"]
    bits = ["-pkeyopt", "rsa_keygen_bits:2048"]
    files = ["-keyout", key, "-out", certificate]
    subprocess.run([*command, *bits, *options, *files], check=True, capture_output=True)
    return key, certificate


PBES2 = bytes.fromhex("06092a864886f70d01050d")
BOUND = ["md:sha384", "mgf1_md:sha384", "saltlen:48"]


@pytest.mark.parametrize(("parameters", "digest"), [([], None), (BOUND, "sha384")])
def test_a_key_its_certificate_and_what_is_written_of_it(
    tmp_path: Path, parameters: list[str], digest: str | None
) -> None:
    path, certificate = make(tmp_path, *parameters)
    key = load_private_key(str(path), None)
    assert isinstance(key, PSSPrivateKey)
    assert key.binding.digest == digest
    identity, reference = refer_to(load_chain(str(certificate))[0].certificate, str(certificate))
    assert identity == key_id(key.public_key())
    assert reference.startswith("-----BEGIN KEYD KEY REFERENCE-----")
    # The octets that OpenSSL has written.
    command = ["openssl", "pkey", "-in", path, "-outform", "DER"]
    written = subprocess.run(command, check=True, capture_output=True).stdout
    assert key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()) == written
    again = as_bound(key.key, written)
    assert again.public_key() == key.public_key()


@pytest.mark.parametrize(
    "how",
    [
        "-aes256",
        "-aes128",
        "-v2 aes-192-cbc -v2prf hmacWithSHA1",
        "-v2 aes256 -v2prf hmacWithSHA512",
        "-scrypt",
    ],
)
@pytest.mark.parametrize(("parameters", "digest"), [([], None), (BOUND, "sha384")])
def test_an_encrypted_key_is_bound_as_well(
    tmp_path: Path, parameters: list[str], digest: str | None, how: str
) -> None:
    path, _ = make(tmp_path, *parameters)
    encrypted, passphrase = tmp_path / "encrypted", tmp_path / "passphrase"
    passphrase.write_text("a passphrase\n")
    command = ["openssl", *("pkcs8 -topk8" if "v2" in how or "scrypt" in how else "pkey").split()]
    files = ["-in", path, "-out", encrypted, "-passout", f"file:{passphrase}"]
    subprocess.run([*command, *how.split(), *files], check=True, capture_output=True)
    assert b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in encrypted.read_bytes()
    loaded = load_private_key(str(encrypted), str(passphrase))
    assert isinstance(loaded, PSSPrivateKey)
    assert loaded.binding.digest == digest
    assert loaded.public_key() == load_private_key(str(path), None).public_key()


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        (["md:sha1", "mgf1_md:sha1", "saltlen:20"], "a digest other than SHA-256"),
        (["md:sha256", "mgf1_md:sha512", "saltlen:32"], "its mask is made with another digest"),
        (["md:sha256", "mgf1_md:sha256", "saltlen:64"], "its salt has to have 64 octets"),
    ],
)
def test_a_key_that_tls_cannot_use_is_named(
    tmp_path: Path, parameters: list[str], reason: str
) -> None:
    key, certificate = make(tmp_path, *parameters)
    with pytest.raises(UnusableKey, match=reason):
        load_private_key(str(key), None)
    with pytest.raises(UnusableKey, match=reason):
        refer_to(load_chain(str(certificate))[0].certificate, str(certificate))


@given(st.binary(max_size=80), st.binary(max_size=8))
def test_what_is_not_encrypted_as_openssl_does_has_no_beginning(der: bytes, more: bytes) -> None:
    for octets in (der, tlv(SEQUENCE, tlv(SEQUENCE, PBES2 + tlv(SEQUENCE, der)) + more)):
        text = base64.b64encode(octets).decode()
        pem = f"-----BEGIN ENCRYPTED PRIVATE KEY-----\n{text}\n-----END ENCRYPTED PRIVATE KEY-----"
        assert beginning(pem.encode(), b"a passphrase") == beginning(pem.encode(), None) == b""


@pytest.mark.parametrize(
    "octets", [b"", b"0", b"-" * 60, b"\x30\x80", bytes(100), b"\x30\x03\x02\x01"]
)
def test_what_is_no_key_is_bound_to_nothing(octets: bytes) -> None:
    assert binding_of_key(octets) is None
