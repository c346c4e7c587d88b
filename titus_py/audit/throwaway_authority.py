"""A certificate authority that exists as long as a demo or a test runs, and what it issues.

Used to start a throwaway instance, and never by a process that serves. The certificates have the
extensions that RFC 5280 demands (§4.2.1): strict clients, as Python's are by default from 3.13
on, accept no others.
"""

import datetime
import ipaddress
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from keyd.powers import LibraryKey

__all__ = ["KEY_TYPES", "Issued", "ThrowawayAuthority"]

KEY_TYPES: dict[str, Callable[[], LibraryKey]] = {
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "RSA-2048": lambda: rsa.generate_private_key(65537, 2048),
    "RSA-4096": lambda: rsa.generate_private_key(65537, 4096),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
}

_VALIDITY = datetime.timedelta(days=90)
#: Certificates are valid since so long ago, for clocks that are behind.
_AGE = datetime.timedelta(days=1)

#: The bits of a KeyUsage (RFC 5280 §4.2.1.3).
_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
    "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


class Issued(NamedTuple):
    """A certificate and its private key (PKCS #8, not encrypted), as PEM."""

    certificate: bytes
    key: bytes


class ThrowawayAuthority:
    """An authority; ``certificate`` is its own, as PEM, which a client has to trust."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("throwaway authority")
        root = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = root.public_bytes(Encoding.PEM)

    def issue(self, key_type: str, names: Sequence[str]) -> Issued:
        """Issue a certificate with a new key for these names; some may be IP addresses.

        ``key_type`` is one of KEY_TYPES. The certificate is valid for 90 days.
        """
        key = KEY_TYPES[key_type]()
        uses = ["digital_signature"]
        if isinstance(key, rsa.RSAPrivateKey):
            # For the RSA key exchange (RFC 5246 §7.4.2).
            uses.append("key_encipherment")
        leaf = (
            self._builder(_name(names[0]), key)
            .add_extension(
                x509.SubjectAlternativeName([_general_name(name) for name in names]),
                critical=False,
            )
            .add_extension(_usage(*uses), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        return Issued(
            leaf.public_bytes(Encoding.PEM),
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        )

    def _builder(self, subject: x509.Name, key: LibraryKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .issuer_name(self._name)
            .subject_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _AGE)
            .not_valid_after(now + _VALIDITY)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*allowed: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in allowed for usage in _USAGES})
