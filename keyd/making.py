"""Makes private keys, and requests for their certificates, or certificates that they sign.

Runs as ``keyd make``, which ``titus-py rekey`` and ``titus-py keys new`` start as root. Before it
makes anything, it gives up root, the network and every file (``confine``): what it reads and writes
are descriptors that come with each order. So no key's octets are in the command that started it,
and this process has no key but the new ones. It trusts that command; the certificates that it reads
are the administrator's.
"""

import json
import os
import resource
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from keyd import confinement
from keyd.chain import UNREADABLE
from keyd.keys import passphrase_in
from keyd.linux import landlock, seccomp
from keyd.linux.credentials import limit
from keyd.linux.descriptors import receive_descriptors
from keyd.powers import LibraryKey
from keyd.system_calls import MAKING
from keyd.words import end_at_the_unforeseen

__all__ = ["Order", "confine", "kind_of", "make", "make_known", "serve"]

_ORDER_OCTETS = 1024
_CURVES: Mapping[str, ec.EllipticCurve] = {
    "p-256": ec.SECP256R1(),
    "p-384": ec.SECP384R1(),
    "p-521": ec.SECP521R1(),
}
_KINDS = {curve.name: kind for kind, curve in _CURVES.items()}
#: Where it is not SHA-256; for Ed25519, it is part of the algorithm.
_DIGESTS: Mapping[str, hashes.SHA384 | hashes.SHA512 | None] = {
    "p-384": hashes.SHA384(),
    "p-521": hashes.SHA512(),
    "ed25519": None,
}
#: RFC 5280 §4.2.1.3.
_KEY_USES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)
#: What it may have open, and how many octets a file that it writes may have.
_MAX_DESCRIPTORS, _MAX_FILE_OCTETS = 16, 1024 * 1024
_RSA_EXPONENT = 65537
#: How long a certificate is valid whose key is known, and which nobody needs to renew. And from how
#: long ago: the other host's clock may be slow.
_KNOWN_VALIDITY = timedelta(days=36_500)
_SLOW_CLOCK = timedelta(days=1)


class Order(NamedTuple):
    """What to make, and the descriptors for it."""

    #: Such as ``rsa-2048``, ``p-256`` or ``ed25519``; None: the kind that the certificate has.
    kind: str | None
    #: The old certificate, PEM: to read.
    certificate: int
    #: The key: to write, or to read if ``has_key``.
    key: int
    #: To write; -1: no request is wanted.
    request: int
    #: The file whose first line is the passphrase, to read; -1: the key is not encrypted.
    passphrase: int
    #: The key was made by an earlier order: only the request is missing.
    has_key: bool


class _CannotMake(Exception):
    """The text says why."""


def confine(to: confinement.Confinement) -> None:
    """Give up everything but memory and the descriptors that are open; raises OSError, CannotLock.

    As keyd itself does, and then with a filter that is narrower, Landlock, and limits.
    """
    program = seccomp.Program(seccomp.build(MAKING))
    # What the library loads late: no file can be opened later.
    request_for(None, generate("p-256"))
    self_signed("host.invalid", generate("p-256"), 0)
    _encoded(generate("ed25519"), b"passphrase")
    confinement.confine(to)
    if landlock.version():
        landlock.restrict_self(landlock.make_ruleset())
    limit(
        {
            resource.RLIMIT_NOFILE: _MAX_DESCRIPTORS,
            resource.RLIMIT_FSIZE: _MAX_FILE_OCTETS,
            resource.RLIMIT_NPROC: 0,
        }
    )
    end_at_the_unforeseen()
    seccomp.install(program)


def serve(orders: socket.socket) -> None:
    """Carry orders out until end of file. The answer to each is JSON: ``problem`` is null or why.

    An order is JSON with ``kind``, ``has_key``, ``has_request`` (the request's descriptor comes
    with it) and ``encrypted`` (the passphrase's does); the descriptors are in Order's sequence.
    Or with ``kind``, ``known`` (a name) and ``now`` (in Unix time), and the descriptors of the key
    and the certificate.
    """
    while True:
        message, descriptors = receive_descriptors(orders, _ORDER_OCTETS, 4)
        if not message:
            return
        problem = None
        try:
            told = json.loads(message)
            if "known" in told:
                key, certificate = descriptors
                make_known(told["kind"], told["known"], told["now"], key, certificate)
            else:
                make(_order(told, descriptors))
        except _CannotMake as error:
            problem = str(error)
        except OSError as error:
            problem = f"cannot be read or written: {error.strerror}"
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        orders.send(json.dumps({"problem": problem}).encode())


def _order(told: Mapping[str, Any], descriptors: Sequence[int]) -> Order:
    certificate, key, *others = descriptors
    request = others.pop(0) if told["has_request"] else -1
    passphrase = others.pop(0) if told["encrypted"] else -1
    return Order(told["kind"], certificate, key, request, passphrase, told["has_key"])


def make(order: Order) -> None:
    """Make a key and its request; raises OSError, or _CannotMake."""
    try:
        leaf = x509.load_pem_x509_certificate(_read(order.certificate))
        kind = order.kind or kind_of(leaf.public_key())
        passphrase = None
        if order.passphrase >= 0 and not (passphrase := passphrase_in(_read(order.passphrase))):
            raise _CannotMake("the first line of its passphrase file is empty")
        if order.has_key:
            key = _made_before(_read(order.key), passphrase, kind)
        else:
            key = generate(kind)
            _write(order.key, _encoded(key, passphrase))
        if order.request >= 0:
            _write(order.request, request_for(leaf, key))
    except UNREADABLE as error:
        raise _CannotMake(f"its certificate cannot be taken over into a request: {error}") from None


def make_known(kind: str, name: str, now: int, key_file: int, certificate_file: int) -> None:
    """Make a key and a certificate that it signs itself; raises OSError, or _CannotMake.

    The files are descriptors to write. ``now`` is in Unix time.
    """
    key = generate(kind)
    try:
        certificate = self_signed(name, key, now)
    except ValueError as error:
        raise _CannotMake(f"{name} cannot be a certificate's name: {error}") from None
    _write(key_file, _encoded(key, None))
    _write(certificate_file, certificate)


def generate(kind: str) -> LibraryKey:
    """A new key of a kind such as ``rsa-2048``, ``p-256`` or ``ed25519``."""
    if kind in _CURVES:
        return ec.generate_private_key(_CURVES[kind])
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    name, _, bits = kind.partition("-")
    if name != "rsa" or not bits.isdecimal() or not 2048 <= int(bits) <= 8192:
        raise _CannotMake(f"no key of the kind {kind} can be made")
    return rsa.generate_private_key(_RSA_EXPONENT, int(bits))


def kind_of(key: PublicKeyTypes) -> str:
    """The kind of a key as ``generate`` takes it."""
    if isinstance(key, rsa.RSAPublicKey):
        return f"rsa-{key.key_size}"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return _KINDS.get(key.curve.name, key.curve.name)
    return type(key).__name__.removesuffix("PublicKey").lower()


def request_for(leaf: x509.Certificate | None, key: LibraryKey) -> bytes:
    """A certificate signing request (RFC 2986, PEM) for the certificate's names, and this key.

    The names are its subject and its subjectAltName. Must-staple (RFC 7633) is kept as well.
    """
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        leaf.subject if leaf is not None else x509.Name([])
    )
    for extension in leaf.extensions if leaf is not None else ():
        if isinstance(extension.value, x509.SubjectAlternativeName | x509.TLSFeature):
            builder = builder.add_extension(extension.value, extension.critical)
    digest = _DIGESTS.get(kind_of(key.public_key()), hashes.SHA256())
    return builder.sign(key, digest).public_bytes(Encoding.PEM)


def self_signed(name: str, key: LibraryKey, now: int) -> bytes:
    """A certificate (PEM) for this host name, for a TLS server and for a TLS client.

    It can certify no other. Raises ValueError.
    """
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    begins = datetime.fromtimestamp(now, UTC)
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    signs = dict.fromkeys(_KEY_USES, False) | {"digital_signature": True}
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins - _SLOW_CLOCK)
        .not_valid_after(begins + _KNOWN_VALIDITY)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**signs), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    digest = _DIGESTS.get(kind_of(key.public_key()), hashes.SHA256())
    return builder.sign(key, digest).public_bytes(Encoding.PEM)


def _made_before(pem: bytes, passphrase: bytes | None, kind: str) -> LibraryKey:
    try:
        key = load_pem_private_key(pem, passphrase)
    except (TypeError, *UNREADABLE):
        raise _CannotMake("holds no private key that can be read, with its passphrase") from None
    if kind_of(key.public_key()) != kind or not isinstance(
        key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
    ):
        raise _CannotMake(f"is a key of the kind {kind_of(key.public_key())}, and not {kind}")
    return key


def _encoded(key: LibraryKey, passphrase: bytes | None) -> bytes:
    protection: KeySerializationEncryption = NoEncryption()
    if passphrase is not None:
        protection = BestAvailableEncryption(passphrase)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)


def _read(descriptor: int) -> bytes:
    content = bytearray()
    while piece := os.read(descriptor, 65536):
        content += piece
    return bytes(content)


def _write(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]
