"""ML-DSA keys: named where the library does not know them."""

import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

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
