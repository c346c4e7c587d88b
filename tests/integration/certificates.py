"""A throwaway certificate authority."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

KINDS: dict[str, Callable[[], Key]] = {
    "RSA-2048": lambda: rsa.generate_private_key(65537, 2048),
    "RSA-4096": lambda: rsa.generate_private_key(65537, 4096),
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "Ed25519": lambda: ed25519.Ed25519PrivateKey.generate(),
}


class Certificate(NamedTuple):
    """A certificate's files; ``authority`` is what a client trusts to trust it."""

    certificate: Path
    key: Path
    authority: Path


class Authority:
    """Issues certificates below one directory: one of each kind and name, once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "throwaway authority")])
        self._issued: dict[tuple[str, tuple[str, ...]], Certificate] = {}
        self._file = directory / "authority.crt"
        usage = x509.BasicConstraints(ca=True, path_length=0)
        root = self._builder(self._name).public_key(self._key.public_key())
        certificate = root.add_extension(usage, critical=True).sign(self._key, hashes.SHA256())
        self._file.write_bytes(certificate.public_bytes(Encoding.PEM))

    def issue(self, kind: str = "P-256", *names: str) -> Certificate:
        """A certificate for these names, or for ``localhost``, with a key of this kind."""
        names = names or ("localhost",)
        if (kind, names) not in self._issued:
            self._issued[kind, names] = self._issue(kind, names)
        return self._issued[kind, names]

    def _issue(self, kind: str, names: tuple[str, ...]) -> Certificate:
        key = KINDS[kind]()
        stem = f"{len(self._issued)}-{kind}"
        files = Certificate(
            self._directory / f"{stem}.crt", self._directory / f"{stem}.key", self._file
        )
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        alternatives = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        certificate = (
            self._builder(subject)
            .public_key(key.public_key())
            .add_extension(alternatives, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        files.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
        files.key.touch(mode=0o600)
        files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return files

    def _builder(self, subject: x509.Name) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .issuer_name(self._name)
            .subject_name(subject)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=90))
        )
