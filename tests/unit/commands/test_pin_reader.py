"""What is read of a file by which a key is known, and what is not."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from keyd.linux.sealed import sealed_file
from keyd.making import generate, self_signed
from titus_py.commands.pin_reader import UNREADABLE, CannotRead, keys_of_file
from titus_py.worker.certificate_facts import facts_of

KEY = ec.generate_private_key(ec.SECP256R1())
CERTIFICATE = self_signed("web-1", KEY, 1_800_000_000)
DER = x509.load_pem_x509_certificate(CERTIFICATE).public_bytes(Encoding.DER)
PEM_KEY = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read(content: bytes) -> list[tuple[str, str, str]]:
    with open(sealed_file("test", content), "rb") as file:
        return keys_of_file(file.fileno())


def public(encoding: Encoding, of: PublicFormat = PublicFormat.SubjectPublicKeyInfo) -> bytes:
    return KEY.public_key().public_bytes(encoding, of)


PIN = hashlib.sha256(public(Encoding.DER)).hexdigest()


def test_every_form_has_the_same_pin() -> None:
    shown = PIN, "CN=web-1", "2126-12-22"
    for content in (CERTIFICATE, DER, b"Bag Attributes\n" + CERTIFICATE):
        assert read(content) == [shown]
    assert read(CERTIFICATE.replace(b" CERT", b" X509 CERT")) == [shown]
    for encoding in (Encoding.PEM, Encoding.DER):
        assert read(public(encoding)) == [(PIN, "", "")]


@pytest.mark.parametrize("kind", ["rsa-2048", "p-384", "p-521", "ed25519"])
def test_it_is_the_pin_that_openssl_finds(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(self_signed("web-1", generate(kind), 0))
    program = "openssl x509 -in file -noout -pubkey | openssl pkey -pubin -outform DER | sha256sum"
    done = subprocess.run(program, shell=True, cwd=tmp_path, capture_output=True, check=True)
    ((pin, _, _),) = read((tmp_path / "file").read_bytes())
    assert done.stdout.split()[0].decode() == pin


def test_a_key_that_is_bound_to_pss_is_another_than_the_plain_one(tmp_path: Path) -> None:
    """As a certificate, and as a public key, in each form; as a worker knows it as well."""
    program = """
        openssl req -x509 -newkey rsa-pss -nodes -subj /CN=x -keyout key -out crt 2>/dev/null
        openssl x509 -in crt -noout -pubkey > pub.pem
        openssl pkey -pubin -in pub.pem -outform DER > pub.der
        openssl x509 -in crt -outform DER > crt.der
        sha256sum pub.der
    """
    done = subprocess.run(program, shell=True, cwd=tmp_path, capture_output=True, check=True)
    pin = done.stdout.split()[0].decode()
    for name in ("crt", "crt.der", "pub.pem", "pub.der"):
        ((found, _, _),) = read((tmp_path / name).read_bytes())
        assert found == pin
    certificate = x509.load_pem_x509_certificate((tmp_path / "crt").read_bytes())
    assert facts_of(certificate).spki == pin


def test_an_rsa_key_in_its_older_form() -> None:
    key = rsa.generate_private_key(65537, 2048).public_key()
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    for encoding in (Encoding.PEM, Encoding.DER):
        assert read(key.public_bytes(encoding, PublicFormat.PKCS1)) == [
            (hashlib.sha256(spki).hexdigest(), "", "")
        ]


def test_all_of_a_chain_in_its_order() -> None:
    other = self_signed("other", ed25519.Ed25519PrivateKey.generate(), 0)
    assert [whose for _, whose, _ in read(CERTIFICATE + other)] == ["CN=web-1", "CN=other"]


def private_forms() -> list[bytes]:
    rsa_key = rsa.generate_private_key(65537, 2048)
    return [
        key.private_bytes(encoding, form, NoEncryption())
        for key in (KEY, rsa_key)
        for encoding in (Encoding.PEM, Encoding.DER)
        for form in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL)
    ]


@pytest.mark.parametrize("content", [*private_forms(), CERTIFICATE + PEM_KEY, PEM_KEY[:60]])
def test_a_private_key_is_refused_unread(content: bytes) -> None:
    with pytest.raises(CannotRead, match="a private key in it, which is not read"):
        read(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "neither a certificate nor a public key"),
        (os.urandom(2000), "neither a certificate nor a public key"),
        (bytes(2 << 20), "more than a MiB"),
        (CERTIFICATE[:-40], "is damaged in line 1"),
        (CERTIFICATE.replace(b" CERT", b" ATTRIBUTE CERT"), "but ATTRIBUTE CERTIFICATE"),
    ],
)
def test_what_else_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(CannotRead, match=said):
        read(content)


@given(st.data())
def test_damage_is_refused_or_seen_in_the_pin(data: st.DataObject) -> None:
    """Nothing but what the reader knows is raised, whatever octets there are."""
    damaged = bytearray(DER)
    for place in data.draw(st.lists(st.integers(0, len(DER) - 1), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        read(bytes(damaged))
    except (CannotRead, *UNREADABLE):
        pass
