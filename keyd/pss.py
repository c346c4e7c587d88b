"""RSA keys that are bound to PSS (id-RSASSA-PSS; RFC 4055), which the library takes for plain ones.

Run wherever keys and certificates are read. Such a key signs with PSS and does nothing else,
perhaps with one digest only (its parameters). What it is bound to is in the AlgorithmIdentifier
beside it, which is kept as it was written: it is part of what the key's id is made of.
"""

import base64
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    KeySerializationEncryption,
    PrivateFormat,
    PublicFormat,
)

from keyd.der import (
    BIT_STRING,
    INTEGER,
    OCTET_STRING,
    SEQUENCE,
    content,
    head,
    length,
    members,
    tlv,
)

__all__ = [
    "Binding",
    "PSSPrivateKey",
    "PSSPublicKey",
    "binding_of_key",
    "binding_of_tbs",
    "spki_of_tbs",
]

_PSS = bytes.fromhex("06092a864886f70d01010a")
_MGF1 = bytes.fromhex("06092a864886f70d010108")
_DIGESTS = {
    bytes.fromhex("0609608648016503040201"): "sha256",
    bytes.fromhex("0609608648016503040202"): "sha384",
    bytes.fromhex("0609608648016503040203"): "sha512",
}
_DIGEST_OCTETS = {"sha256": 32, "sha384": 48, "sha512": 64}


class Binding(NamedTuple):
    """What a key is bound to."""

    #: The AlgorithmIdentifier, DER.
    algorithm: bytes
    #: The one digest that it signs with, such as ``sha256``; None: any.
    digest: str | None


class PSSPublicKey:
    """The public part of a key that is bound to PSS."""

    def __init__(self, key: rsa.RSAPublicKey, binding: Binding) -> None:
        self.key = key
        self.binding = binding

    def public_bytes(self, encoding: Encoding, form: PublicFormat) -> bytes:
        """As the library's keys have it: the SubjectPublicKeyInfo, DER."""
        if (encoding, form) != (Encoding.DER, PublicFormat.SubjectPublicKeyInfo):
            raise ValueError("a key bound to PSS is written as SubjectPublicKeyInfo alone")
        numbers = self.key.public_bytes(Encoding.DER, PublicFormat.PKCS1)
        return tlv(SEQUENCE, self.binding.algorithm + tlv(BIT_STRING, b"\0" + numbers))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, PSSPublicKey)
            and self.key == other.key
            and self.binding == other.binding
        )

    def __hash__(self) -> int:
        return hash(self.binding)


class PSSPrivateKey:
    """A key that is bound to PSS."""

    def __init__(self, key: rsa.RSAPrivateKey, binding: Binding) -> None:
        self.key = key
        self.binding = binding

    def public_key(self) -> PSSPublicKey:
        return PSSPublicKey(self.key.public_key(), self.binding)

    def private_bytes(
        self, encoding: Encoding, form: PrivateFormat, protection: KeySerializationEncryption
    ) -> bytes:
        """As the library's keys have it: PKCS #8, DER, not encrypted."""
        if (encoding, form) != (Encoding.DER, PrivateFormat.PKCS8):
            raise ValueError("a key bound to PSS is written as PKCS #8 alone")
        numbers = self.key.private_bytes(Encoding.DER, PrivateFormat.TraditionalOpenSSL, protection)
        version = tlv(INTEGER, b"\0")
        return tlv(SEQUENCE, version + self.binding.algorithm + tlv(OCTET_STRING, numbers))


def binding_of_key(pkcs8: bytes | memoryview) -> Binding | None:
    """What a private key (PKCS #8, DER or PEM, not encrypted) is bound to; None: it is not.

    The beginning of the DER is enough. Of a memoryview (DER), only what tells that is copied.
    Raises ValueError for parameters with which no TLS server can use it.
    """
    if isinstance(pkcs8, bytes) and b"-----BEGIN PRIVATE KEY-----" in pkcs8:
        text = pkcs8.partition(b"-----BEGIN PRIVATE KEY-----")[2].partition(b"-----")[0]
        pkcs8 = base64.b64decode(text)
    elif pkcs8[:1] != bytes((SEQUENCE,)):
        return None
    try:
        rest = pkcs8[head(pkcs8) :]
        rest = rest[length(rest) :]
        algorithm = bytes(rest[: length(rest)])
        bound = next(members(algorithm), b"") == _PSS
    except ValueError:
        return None
    return _binding(algorithm) if bound else None


def binding_of_tbs(tbs: bytes) -> Binding | None:
    """The same for a certificate's key: ``tbs`` is its TBSCertificate (RFC 5280 §4.1)."""
    algorithm, *_ = members(spki_of_tbs(tbs))
    return _binding(bytes(algorithm))


def spki_of_tbs(tbs: bytes) -> bytes:
    """The SubjectPublicKeyInfo of a certificate, as it was written: the library rewrites it."""
    fields = list(members(tbs))
    explicit_version = fields[0][:1] == b"\xa0"
    return bytes(fields[6 if explicit_version else 5])


def _binding(algorithm: bytes) -> Binding | None:
    kind, *parameters = members(algorithm)
    if kind != _PSS:
        return None
    if not parameters:
        return Binding(algorithm, None)
    # RSASSA-PSS-params (RFC 4055 §3.1): [0] digest, [1] mask generation, [2] salt, [3] trailer.
    fields = {field[0] & 0x1F: bytes(content(field)) for field in members(parameters[0])}
    digest = _digest(fields.get(0))
    mask, *of_mask = members(fields[1]) if 1 in fields else (b"",)
    if mask != _MGF1 or not of_mask or _digest(of_mask[0]) != digest:
        raise ValueError("its mask is made with another digest than it signs with")
    least_salt = int.from_bytes(content(fields[2]), "big") if 2 in fields else 20
    if least_salt > _DIGEST_OCTETS[digest]:
        raise ValueError(f"its salt has to have {least_salt} octets, more than its digest has")
    return Binding(algorithm, digest)


def _digest(algorithm: bytes | None) -> str:
    """Left out, it is SHA-1."""
    kind = next(members(algorithm), b"") if algorithm is not None else b""
    if kind not in _DIGESTS:
        raise ValueError("it is bound to a digest other than SHA-256, SHA-384 and SHA-512")
    return _DIGESTS[kind]
