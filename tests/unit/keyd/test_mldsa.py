"""ML-DSA keys: named where the library does not know them."""

import base64
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from keyd.der import INTEGER, OCTET_STRING, SEQUENCE, tlv
from keyd.inspection.key_search import Needle, needles
from keyd.keys import UnusableKey, load_private_key
from keyd.mldsa import KEY_TYPES, PUBLIC_OCTETS, name_of_identifier, parameter_set

#: As with Debian 13's library: no such types, and it cannot read such a key.
WITHOUT = """
import sys
from keyd import mldsa
mldsa.KEY_TYPES.clear()
from cryptography.exceptions import UnsupportedAlgorithm
from keyd import keys
def load_pem_private_key(*_, **__):
    raise UnsupportedAlgorithm("Unsupported key type.")
keys.load_pem_private_key = load_pem_private_key
from keyd.reference import SERVED_KEYS
print(SERVED_KEYS)
try:
    keys.load_private_key(sys.argv[1], None)
except keys.UnusableKey as error:
    print(error.reason)
"""


@pytest.mark.parametrize("name", PUBLIC_OCTETS)
def test_a_key_is_known_by_its_parameter_set(name: str) -> None:
    key = KEY_TYPES[name][0].generate()  # type: ignore[attr-defined]
    assert parameter_set(key) == parameter_set(key.public_key()) == name
    pkcs8 = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    assert name_of_identifier(pkcs8[:32]) == name
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert name_of_identifier(public[:32]) == name
    assert len(key.public_key().public_bytes_raw()) == PUBLIC_OCTETS[name]


#: By OpenSSL 3.5's ``openssl genpkey -algorithm ML-DSA-44``: the seed and the expanded key.
BY_OPENSSL = Path(__file__).with_name("mldsa44.pem")


def of_openssl() -> bytes:
    """The key that OpenSSL has written, in PKCS #8."""
    return base64.b64decode("".join(BY_OPENSSL.read_text().splitlines()[1:-1]))


def as_pem(der: bytes, label: str = "PRIVATE KEY") -> str:
    return f"-----BEGIN {label}-----\n{base64.encodebytes(der).decode()}-----END {label}-----\n"


def encrypted(pkcs8: bytes) -> str:
    """As openssl(1) encrypts it, with the passphrase ``word``."""
    salt, vector = bytes(16), bytes(16)
    key = hashlib.pbkdf2_hmac("sha256", b"word", salt, 2048, 32)
    padding = 16 - len(pkcs8) % 16
    encryptor = Cipher(AES(key), CBC(vector)).encryptor()
    octets = encryptor.update(pkcs8 + bytes([padding]) * padding)
    iterations, hmac = tlv(INTEGER, b"\x08\x00"), bytes.fromhex("06082a864886f70d0209")
    parameters = tlv(OCTET_STRING, salt) + iterations + tlv(SEQUENCE, hmac + b"\x05\x00")
    pbkdf2 = bytes.fromhex("06092a864886f70d01050c") + tlv(SEQUENCE, parameters)
    aes = bytes.fromhex("060960864801650304012a") + tlv(OCTET_STRING, vector)
    both = tlv(SEQUENCE, tlv(SEQUENCE, pbkdf2) + tlv(SEQUENCE, aes))
    scheme = tlv(SEQUENCE, bytes.fromhex("06092a864886f70d01050d") + both)
    return as_pem(tlv(SEQUENCE, scheme + tlv(OCTET_STRING, octets)), "ENCRYPTED PRIVATE KEY")


@pytest.mark.parametrize("protected", [False, True])
def test_a_key_as_openssl_writes_it(tmp_path: Path, protected: bool) -> None:
    """Its public part is in the expanded key: rho, and what SHAKE256 makes of it (FIPS 204)."""
    file, passphrase = tmp_path / "site.key", tmp_path / "passphrase"
    file.write_text(encrypted(of_openssl()) if protected else BY_OPENSSL.read_text())
    passphrase.write_text("word\n")
    key = load_private_key(str(file), str(passphrase) if protected else None)
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert parameter_set(key) == "ML-DSA-44"
    assert hashlib.shake_256(public[-PUBLIC_OCTETS["ML-DSA-44"] :]).digest(64) in of_openssl()


def test_what_belongs_to_another_key_and_what_lacks_its_seed_is_named(tmp_path: Path) -> None:
    file, whole = tmp_path / "site.key", of_openssl()
    seed_at = whole.index(b"\x04\x20") + 2
    file.write_text(as_pem(whole[:seed_at] + bytes(32) + whole[seed_at + 32 :]))
    with pytest.raises(UnusableKey, match="is damaged"):
        load_private_key(str(file), None)
    expanded = tlv(OCTET_STRING, whole[-2560:])
    head = whole[4:20]
    file.write_text(as_pem(tlv(SEQUENCE, head + tlv(OCTET_STRING, expanded))))
    with pytest.raises(UnusableKey, match="is an ML-DSA-44 key without the seed"):
        load_private_key(str(file), None)


def test_what_is_looked_for_is_in_each_form_of_the_key() -> None:
    """Of an expanded key without its seed, that is K: it follows rho."""
    whole = of_openssl()
    expanded = whole[-2560:]
    forms = [
        (BY_OPENSSL.read_bytes(), {"seed, in PEM", "K, in PEM"}),
        (whole, {"seed", "K"}),
        (expanded, {"K"}),
        (as_pem(expanded).encode(), {"K, in PEM"}),
    ]
    sought = needles(load_private_key(str(BY_OPENSSL), None))
    assert Needle("K", expanded[32:64]) in sought
    for octets, names in forms:
        assert {needle.name for needle in sought if needle.octets in octets} == names


@pytest.mark.parametrize("octets", [b"", b"\x06\x09", bytes(100)])
def test_what_names_no_parameter_set(octets: bytes) -> None:
    assert name_of_identifier(octets) is None


def test_where_the_library_does_not_know_it_the_key_is_named(tmp_path: Path) -> None:
    key = KEY_TYPES["ML-DSA-65"][0].generate()  # type: ignore[attr-defined]
    file = tmp_path / "site.key"
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    command = [sys.executable, "-c", WITHOUT, file]
    served, reason = subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert served.endswith("P-521, and Ed25519")
    unknown = "an ML-DSA-65 key, which this version of cryptography does not know"
    assert reason == f"{file} is {unknown}"
