"""Certificates, and whether a key belongs to one.

Runs in the short-lived ``keyd check`` alone: keyd itself has no use for certificates, nor
for the time that it takes to load what reads them.
"""

import datetime
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding

from keyd import mldsa
from keyd.chain import UNREADABLE, Located, doubts, name_of
from keyd.keys import Read, UnusableKey, load_private_key, read, why_binary
from keyd.pem import Damaged, blocks
from keyd.powers import PrivateKey
from keyd.pss import PSSPublicKey, binding_of_tbs
from keyd.reference import UnsupportedKey, key_id, reference_pem

__all__ = ["Findings", "KeyFiles", "Problem", "examine", "load_chain", "refer_to"]

#: Labels of PEM blocks that might be taken for a certificate as TLS shows it, and are none.
_MISLABELLED = {
    "TRUSTED CERTIFICATE": "has OpenSSL's trust settings in it: take them out with 'openssl x509'",
    "CERTIFICATE REQUEST": "is only a request for a certificate",
    "NEW CERTIFICATE REQUEST": "is only a request for a certificate",
    "ATTRIBUTE CERTIFICATE": "is no certificate for a key",
    "PKCS7": "is to be unpacked, with 'openssl pkcs7 -print_certs'",
    "CMS": "is to be unpacked, with 'openssl pkcs7 -print_certs'",
}
#: The second is OpenSSL's former label for a certificate.
_LABELS = ("CERTIFICATE", "X509 CERTIFICATE")


class KeyFiles(NamedTuple):
    """The files of one virtual host, or one key that is for certificates elsewhere."""

    certificate: str | None
    #: None where the key is in another keyd: then the certificate is not compared with it.
    key: str | None
    passphrase_file: str | None = None
    #: Whether its peers know its key, and do not ask who has certified it.
    known: bool = False

    @property
    def paths(self) -> list[str]:
        """Those that there are."""
        files = self.certificate, self.key, self.passphrase_file
        return [path for path in files if path is not None]


class Problem(NamedTuple):
    """Something wrong with one of the files; ``field`` is a field of KeyFiles."""

    field: str
    reason: str


class Findings(NamedTuple):
    """What ``keyd check`` found about one KeyFiles."""

    mistakes: list[Problem]
    warnings: list[Problem]
    #: The certificates of the file as PEM, without anything else that it may hold.
    chain: str | None = None
    key_id: str | None = None
    reference: str | None = None
    subject: str = ""
    names: tuple[str, ...] = ()
    not_before: str | None = None
    not_after: str | None = None
    #: Of the key: a server can show a client one certificate of each kind.
    kind: str = ""
    #: The id of the key in the key's file, whatever certificate it is for.
    own_key: str | None = None


def examine(files: KeyFiles, now: datetime.datetime, read: Read = read) -> Findings:
    """Check a certificate, its key and its chain against each other and against the clock."""
    mistakes: list[Problem] = []
    warnings: list[Problem] = []
    key = None
    if files.key is not None:
        try:
            key = load_private_key(files.key, files.passphrase_file, read)
        except UnusableKey as error:
            mistakes.append(Problem(error.field, error.reason))
    own_key = key_id(key.public_key()).hex() if key is not None else None
    if files.certificate is None:
        return Findings(mistakes, warnings, own_key=own_key)
    try:
        chain = load_chain(files.certificate, read)
    except UnusableKey as error:
        mistakes.append(Problem(error.field, error.reason))
        return Findings(mistakes, warnings, own_key=own_key)
    leaf = chain[0].certificate
    identity = reference = None
    try:
        identity, reference = refer_to(leaf, files.certificate)
    except UnusableKey as error:
        mistakes.append(Problem(error.field, error.reason))
    if own_key is not None and identity is not None and identity.hex() != own_key:
        reason = f"{files.key} is not the key of certificate {files.certificate}"
        for other in chain[1:]:
            if key is not None and _is_for(other.certificate, key):
                reason += (
                    f", whose first is {name_of(leaf)}, but of the one in line {other.line}, "
                    f"{name_of(other.certificate)}: put that first"
                )
                break
        mistakes.append(Problem("key", reason))
    warnings += [
        Problem("certificate", doubt)
        for doubt in doubts(files.certificate, chain, now, files.known)
    ]
    return Findings(
        mistakes,
        warnings,
        "".join(one.certificate.public_bytes(Encoding.PEM).decode() for one in chain),
        identity.hex() if identity is not None else None,
        reference,
        _subject(leaf),
        _names(leaf),
        leaf.not_valid_before_utc.isoformat(),
        leaf.not_valid_after_utc.isoformat(),
        _kind(leaf),
        own_key,
    )


def load_chain(path: str, read: Read = read) -> list[Located]:
    """The certificates of a file, at least one; raises UnusableKey.

    Other blocks, such as the key's, only have to be whole.
    """
    chain = []
    others = []
    try:
        content = read(path, "certificate")
        for block in blocks(content):
            if reason := _MISLABELLED.get(block.label):
                raise Damaged(block.line, f"a {block.label}, which {reason}")
            if block.label in _LABELS:
                try:
                    certificate = x509.load_pem_x509_certificate(block.text)
                except UNREADABLE:
                    raise Damaged(block.line, "a damaged certificate") from None
                chain.append(Located(certificate, block.line))
            else:
                others.append(block.label)
    except Damaged as error:
        raise UnusableKey("certificate", f"{path}:{error.line}: {error.reason}") from None
    if not chain:
        # A key, where the two files were swapped; or what was sent to the authority.
        instead = f", but {', '.join(dict.fromkeys(others))}" if others else ""
        reason = why_binary(content, "x509", "-nokeys") or f"holds no PEM certificate{instead}"
        raise UnusableKey("certificate", f"{path} {reason}")
    return chain


def refer_to(leaf: x509.Certificate, path: str) -> tuple[bytes, str]:
    """The id of the key that a certificate is for, and its reference; raises UnusableKey."""
    try:
        key = _public_key(leaf)
        return key_id(key), reference_pem(key).decode()
    except UnsupportedKey as error:
        raise UnusableKey("certificate", f"{path} is for {error}") from None
    except UNREADABLE as error:
        # Versions of the library differ in what they raise for a kind that they do not know.
        name = mldsa.name_of_identifier(leaf.tbs_certificate_bytes)
        if name and not mldsa.KEY_TYPES:
            unknown = f"an {name} key, which this version of cryptography does not know"
            raise UnusableKey("certificate", f"{path} is for {unknown}") from None
        raise UnusableKey("certificate", f"{path}: its key cannot be used: {error}") from None


def _public_key(leaf: x509.Certificate) -> CertificatePublicKeyTypes | PSSPublicKey:
    """The library takes a key that is bound to PSS for a plain RSA key. Raises ValueError."""
    key = leaf.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        try:
            binding = binding_of_tbs(leaf.tbs_certificate_bytes)
        except ValueError as error:
            raise UnsupportedKey(f"an RSA key bound to PSS that TLS cannot use: {error}") from None
        if binding is not None:
            return PSSPublicKey(key, binding)
    return key


def _is_for(certificate: x509.Certificate, key: PrivateKey) -> bool:
    try:
        return _public_key(certificate) == key.public_key()
    except UNREADABLE:
        return False


def _kind(leaf: x509.Certificate) -> str:
    try:
        key = _public_key(leaf)
    except UNREADABLE:
        return ""
    if isinstance(key, PSSPublicKey):
        return "RSA-PSS"
    if parameter_set := mldsa.parameter_set(key):
        return parameter_set
    if isinstance(key, rsa.RSAPublicKey):
        return "RSA"
    return "ECDSA" if isinstance(key, ec.EllipticCurvePublicKey) else "Ed25519"


def _subject(leaf: x509.Certificate) -> str:
    try:
        return leaf.subject.rfc4514_string()
    except UNREADABLE:
        return ""


def _names(leaf: x509.Certificate) -> tuple[str, ...]:
    try:
        extension = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, *UNREADABLE):
        return ()
    names = extension.value
    return (
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    )
