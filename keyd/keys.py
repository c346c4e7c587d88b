"""Private keys and their certificates, read from files.

Runs in keyd alone, as root, before keyd gives its privileges up; and in the
short-lived ``keyd check``, so that no other program needs to open a key to judge
it. Files come from the administrator: trusted, but mistakes are to be named.
"""

import datetime
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from keyd.powers import PrivateKey
from keyd.reference import UnsupportedKey, key_id, reference_pem

__all__ = ["Findings", "KeyFiles", "Problem", "UnusableKey", "examine", "load_private_key"]

#: Certificates that end sooner than this are warned of.
EXPIRY_WARNING = datetime.timedelta(days=21)


class UnusableKey(ValueError):
    """A key that cannot be used; ``field`` names the setting to look at."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason


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
    key_id: str | None = None
    reference: str | None = None
    subject: str = ""
    names: tuple[str, ...] = ()
    not_after: str | None = None


def load_private_key(path: str, passphrase_file: str | None) -> PrivateKey:
    """Read a PEM private key; raises UnusableKey, also for a passphrase that it has not."""
    passphrase = None
    if passphrase_file is not None:
        # One line, as `openssl -passin file:` has it; the newline is not part of it.
        text = _read(passphrase_file, "passphrase_file")
        passphrase = text.split(b"\n", 1)[0].rstrip(b"\r")
    pem = _read(path, "key")
    try:
        key = load_pem_private_key(pem, passphrase)
    except TypeError:
        if passphrase is None:
            raise UnusableKey("key", f"{path} is encrypted: set passphrase_file") from None
        raise UnusableKey(
            "passphrase_file", f"{path} is not encrypted: remove passphrase_file"
        ) from None
    except UnsupportedAlgorithm as error:
        raise UnusableKey("key", f"{path} is of an unsupported kind: {error}") from None
    except ValueError:
        if passphrase is not None:
            reason = f"{passphrase_file} does not decrypt {path}, or {path} is damaged"
            raise UnusableKey("passphrase_file", reason) from None
        raise UnusableKey("key", f"{path} holds no PEM private key") from None
    if not isinstance(
        key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
    ):
        reason = f"{path} is a {type(key).__name__}: RSA, EC and Ed25519 are served"
        raise UnusableKey("key", reason)
    try:
        reference_pem(key.public_key())
    except UnsupportedKey as error:
        raise UnusableKey("key", f"{path} is {error}") from None
    return key


def examine(files: KeyFiles, now: datetime.datetime) -> Findings:
    """Hold certificate and key against each other and against the clock."""
    mistakes: list[Problem] = []
    warnings: list[Problem] = []
    key = leaf = None
    if files.key is not None:
        try:
            key = load_private_key(files.key, files.passphrase_file)
        except UnusableKey as error:
            mistakes.append(Problem(error.field, error.reason))
    try:
        leaf = _load_leaf(files.certificate)
    except UnusableKey as error:
        mistakes.append(Problem(error.field, error.reason))
    if leaf is None:
        return Findings(mistakes, warnings)
    if key is not None and _certified_key_id(leaf) != key_id(key.public_key()):
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
    identity = reference = None
    try:
        public_key = leaf.public_key()
        identity, reference = key_id(public_key).hex(), reference_pem(public_key).decode()
    except (UnsupportedAlgorithm, UnsupportedKey, ValueError) as error:
        mistakes.append(Problem("certificate", f"{files.certificate} is for {error}"))
    return Findings(
        mistakes,
        warnings,
        identity,
        reference,
        leaf.subject.rfc4514_string(),
        _names(leaf),
        ends.isoformat(),
    )


def _read(path: str, field: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnusableKey(field, f"{path}: {error.strerror}") from None


def _load_leaf(path: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificates(_read(path, "certificate"))[0]
    except ValueError:
        raise UnusableKey("certificate", f"{path} holds no PEM certificate") from None


def _certified_key_id(leaf: x509.Certificate) -> bytes | None:
    try:
        return key_id(leaf.public_key())
    except (UnsupportedAlgorithm, ValueError):
        return None


def _names(leaf: x509.Certificate) -> tuple[str, ...]:
    try:
        extension = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        return ()
    names = extension.value
    return (
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    )
