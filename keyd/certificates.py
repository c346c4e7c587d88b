"""Certificates, and whether a key is theirs.

Runs in the short-lived ``keyd check`` alone: keyd itself has no use for certificates, nor
for the time that it takes to load what reads them.
"""

import datetime
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from keyd.keys import UnusableKey, load_private_key, read
from keyd.reference import UnsupportedKey, key_id, reference_pem

__all__ = ["Findings", "KeyFiles", "Problem", "examine", "load_chain", "refer_to"]

#: What the library has against a certificate: some of it only once it is asked for a part.
_UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
#: Certificates that end sooner than this are warned of.
EXPIRY_WARNING = datetime.timedelta(days=21)


class KeyFiles(NamedTuple):
    """The files of one virtual host."""

    certificate: str
    #: None where the key is in another keyd: then there is nothing to hold it against.
    key: str | None
    passphrase_file: str | None = None


class Problem(NamedTuple):
    """Something wrong with one of the files; ``field`` is a field of KeyFiles."""

    field: str
    reason: str


class Findings(NamedTuple):
    """What ``keyd check`` has to say of one KeyFiles."""

    mistakes: list[Problem]
    warnings: list[Problem]
    #: PEM: the certificates of the file, and nothing else that it may hold.
    chain: str | None = None
    key_id: str | None = None
    reference: str | None = None
    subject: str = ""
    names: tuple[str, ...] = ()
    not_after: str | None = None


def examine(files: KeyFiles, now: datetime.datetime) -> Findings:
    """Hold certificate and key against each other and against the clock."""
    mistakes: list[Problem] = []
    warnings: list[Problem] = []
    key = None
    if files.key is not None:
        try:
            key = load_private_key(files.key, files.passphrase_file)
        except UnusableKey as error:
            mistakes.append(Problem(error.field, error.reason))
    try:
        chain = load_chain(files.certificate)
    except UnusableKey as error:
        mistakes.append(Problem(error.field, error.reason))
        return Findings(mistakes, warnings)
    leaf = chain[0]
    identity = reference = None
    try:
        identity, reference = refer_to(leaf, files.certificate)
    except UnusableKey as error:
        mistakes.append(Problem(error.field, error.reason))
    if key is not None and identity is not None and identity != key_id(key.public_key()):
        reason = f"{files.key} is not the key of certificate {files.certificate}"
        mistakes.append(Problem("key", reason))
    ends = leaf.not_valid_after_utc
    if leaf.not_valid_before_utc > now:
        reason = f"{files.certificate} is not valid before {leaf.not_valid_before_utc:%Y-%m-%d}"
        warnings.append(Problem("certificate", reason))
    if ends < now:
        reason = f"{files.certificate} expired on {ends:%Y-%m-%d}: renew it"
        warnings.append(Problem("certificate", reason))
    elif ends < now + EXPIRY_WARNING:
        reason = f"{files.certificate} expires on {ends:%Y-%m-%d}: renew it"
        warnings.append(Problem("certificate", reason))
    return Findings(
        mistakes,
        warnings,
        "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in chain),
        identity.hex() if identity is not None else None,
        reference,
        _subject(leaf),
        _names(leaf),
        ends.isoformat(),
    )


def load_chain(path: str) -> list[x509.Certificate]:
    """The certificates of a file, at least one; raises UnusableKey."""
    pem = read(path, "certificate")
    try:
        return x509.load_pem_x509_certificates(pem)
    except _UNREADABLE:
        raise UnusableKey(
            "certificate", f"{path} holds no PEM certificate, or a damaged one"
        ) from None


def refer_to(leaf: x509.Certificate, path: str) -> tuple[bytes, str]:
    """The id of the key that a certificate is for, and its reference; raises UnusableKey."""
    try:
        # Such a key must not sign anything but PSS, nor decrypt (RFC 4055 §1.2), and the library
        # does not tell it from one that may: so keyd could not keep a worker from asking for it.
        if leaf.public_key_algorithm_oid == x509.PublicKeyAlgorithmOID.RSASSA_PSS:
            raise UnsupportedKey(
                "an RSA key that is bound to PSS (id-RSASSA-PSS): get one for a plain RSA key, "
                "which signs with PSS as well"
            )
        key = leaf.public_key()
        return key_id(key), reference_pem(key).decode()
    except UnsupportedKey as error:
        raise UnusableKey("certificate", f"{path} is for {error}") from None
    except _UNREADABLE as error:
        raise UnusableKey("certificate", f"{path}: its key cannot be used: {error}") from None


def _subject(leaf: x509.Certificate) -> str:
    try:
        return leaf.subject.rfc4514_string()
    except _UNREADABLE:
        return ""


def _names(leaf: x509.Certificate) -> tuple[str, ...]:
    try:
        extension = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, *_UNREADABLE):
        return ()
    names = extension.value
    return (
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    )
