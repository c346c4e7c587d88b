"""An authority for client certificates, with which everything can be wrong."""

import datetime
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)
_CA = x509.BasicConstraints(ca=True, path_length=None)
_NO_CA = x509.BasicConstraints(ca=False, path_length=None)


class ClientCertificate(NamedTuple):
    """A client's files: its certificate with those between it and the authority, and its key."""

    chain: Path
    key: Path
    certificate: x509.Certificate
    #: Those between, once more, if there are any.
    between: Path | None

    @property
    def spki(self) -> str:
        return spki_of(self.certificate)

    @property
    def options(self) -> list[str]:
        """For ``openssl s_client``, which takes the first of a file for ``-cert``."""
        between = ["-cert_chain", str(self.between)] if self.between is not None else []
        return ["-cert", str(self.chain), *between, "-key", str(self.key)]


def spki_of(certificate: x509.Certificate) -> str:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(
        certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    )
    return f"sha256:{digest.finalize().hex()}"


class ClientAuthority:
    """Issues client certificates below a directory; ``file`` is its own certificate."""

    def __init__(
        self,
        directory: Path,
        name: str = "client authority",
        above: "ClientAuthority | None" = None,
        ends: datetime.timedelta = 60 * DAY,
        may_issue: bool = True,
    ) -> None:
        self._directory = directory
        self._directory.mkdir(parents=True, exist_ok=True)
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = _name(name)
        self.above = above
        self.certificate = self._sign(
            self.name, self.key, above or self, [_CA if may_issue else _NO_CA], ends=ends
        )
        self.file = directory / f"{name}.crt"
        self.file.write_bytes(self.certificate.public_bytes(Encoding.PEM))
        self._count = 0

    def issue(
        self,
        cn: str = "alice",
        dns: Sequence[str] = ("alice.example.org",),
        uri: Sequence[str] = (),
        usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
        begins: datetime.timedelta = -DAY,
        ends: datetime.timedelta = 30 * DAY,
        self_signed: bool = False,
        padding: int = 0,
    ) -> ClientCertificate:
        """A certificate, and a key for it; ``padding`` is how many octets longer it is made."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [*map(x509.DNSName, dns), *map(x509.UniformResourceIdentifier, uri)]
        extensions: list[x509.ExtensionType] = [x509.ExtendedKeyUsage([usage])]
        if names:
            extensions.append(x509.SubjectAlternativeName(names))
        if padding:
            extensions.append(
                x509.UnrecognizedExtension(
                    x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"x" * padding
                )
            )
        certificate = self._sign(
            _name(cn), key, None if self_signed else self, extensions, begins, ends
        )
        chain = [certificate]
        authority: ClientAuthority | None = self
        while authority is not None and authority.above is not None:
            chain.append(authority.certificate)
            authority = authority.above
        self._count += 1
        stem = self._directory / f"{self._count}-client"
        between = stem.with_suffix(".between") if chain[1:] else None
        files = ClientCertificate(
            stem.with_suffix(".crt"), stem.with_suffix(".key"), certificate, between
        )
        files.chain.write_bytes(_pem(chain))
        if between is not None:
            between.write_bytes(_pem(chain[1:]))
        files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return files

    def issue_numbered(self, serial: int) -> ClientCertificate:
        """One with any serial number: the library's have at most 20 octets (RFC 5280 §4.1.2.2)."""
        stem = self._directory / f"numbered-{serial.bit_length()}"
        key, chain, own = map(stem.with_suffix, (".key", ".crt", ".authority"))
        own.write_bytes(self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
             "-noenc", "-subj", "/CN=alice", "-set_serial", str(serial), "-days", "30",
             "-CA", self.file, "-CAkey", own, "-keyout", key, "-out", chain],
            check=True, capture_output=True,
        )  # fmt: skip
        made = x509.load_pem_x509_certificate(chain.read_bytes())
        return ClientCertificate(chain, key, made, None)

    def crl(
        self,
        *revoked: ClientCertificate,
        ends: datetime.timedelta = 30 * DAY,
        name: str = "revoked.crl",
    ) -> Path:
        """A list of these, which is written to a file of this name."""
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.name)
            .last_update(now - 60 * DAY)
            .next_update(now + ends)
        )
        for one in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(one.certificate.serial_number)
                .revocation_date(now - DAY)
                .build()
            )
        path = self._directory / name
        path.write_bytes(builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM))
        return path

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        issuer: "ClientAuthority | None",
        extensions: Sequence[x509.ExtensionType],
        begins: datetime.timedelta = -60 * DAY,
        ends: datetime.timedelta = 60 * DAY,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        signer = key if issuer is None else issuer.key
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if issuer is None else issuer.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
                critical=False,
            )
        )
        for extension in extensions:
            critical = isinstance(extension, x509.BasicConstraints)
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(signer, hashes.SHA256())


def _pem(certificates: Sequence[x509.Certificate]) -> bytes:
    return b"".join(one.public_bytes(Encoding.PEM) for one in certificates)


def _name(cn: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example"),
            x509.NameAttribute(NameOID.COMMON_NAME, cn, _validate=len(cn) <= 64),
        ]
    )
