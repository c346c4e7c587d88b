"""The reference file: it names a private key, so that the provider can stand in for it.

Written by the administrator of a TLS server, read by the provider (``provider/``). It
holds nothing secret: the public key and its SHA-256, PEM-like:

    -----BEGIN KEYD KEY REFERENCE-----
    base64 of: version(1) type(1) key(32) and then, each with a two-octet length,
               RSA:           n, e      unsigned, most significant octet first
               EC:            curve     OpenSSL's name of the group
                              point     uncompressed (SEC 1 §2.3.3)
               Ed25519:       key       RFC 8032 §5.1.5
               ML-DSA:        key       FIPS 204 §7.2
               RSA-PSS:       n, e, and the digest that it is bound to, if it is: ``sha256``
    -----END KEYD KEY REFERENCE-----
"""

import base64
import hashlib
import re
import struct

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keyd import mldsa
from keyd.pss import Binding, PSSPublicKey

__all__ = [
    "SERVED_KEYS",
    "UnsupportedKey",
    "id_and_key_of",
    "key_id",
    "kind_of_key",
    "public_key_of",
    "reference_pem",
]

SERVED_KEYS = "RSA of 2048 to 8192 bits (also bound to PSS), ECDSA on P-256, P-384 or P-521, " + (
    "Ed25519 and ML-DSA" if mldsa.KEY_TYPES else "and Ed25519"
)

_VERSION = 1
_RSA, _EC, _ED25519, _RSA_PSS = 1, 2, 3, 4
_ML_DSA = {"ML-DSA-44": 5, "ML-DSA-65": 6, "ML-DSA-87": 7}
_GROUP_NAMES = {"secp256r1": "prime256v1", "secp384r1": "secp384r1", "secp521r1": "secp521r1"}

_CURVES: dict[str, ec.EllipticCurve] = {
    "prime256v1": ec.SECP256R1(),
    "secp384r1": ec.SECP384R1(),
    "secp521r1": ec.SECP521R1(),
}


class UnsupportedKey(ValueError):
    """A key of a kind or size that keyd does not serve."""


def kind_of_key(key: PublicKeyTypes | PrivateKeyTypes | PSSPublicKey) -> str:
    """The kind of a key in words, as in ``an Ed448 key``."""
    kind = re.sub("(Public|Private)Key$", "", type(key).__name__)
    return f"{'an' if kind[0] in 'AEIOX' else 'a'} {kind} key"


def key_id(key: PublicKeyTypes | PSSPublicKey) -> bytes:
    """The SHA-256 of the SubjectPublicKeyInfo: 32 octets."""
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()


def reference_pem(key: PublicKeyTypes | PSSPublicKey) -> bytes:
    """The reference file for the private key that belongs to this public one.

    Raises UnsupportedKey.
    """
    kind, fields = _fields(key)
    content = bytes((_VERSION, kind)) + key_id(key)
    content += b"".join(struct.pack("!H", len(field)) + field for field in fields)
    text = base64.encodebytes(content)
    return b"-----BEGIN KEYD KEY REFERENCE-----\n" + text + b"-----END KEYD KEY REFERENCE-----\n"


def public_key_of(reference: str) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey | None:
    """The public key in a reference that this module wrote; None for one of another kind."""
    _, key = id_and_key_of(reference)
    return key if isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey) else None


def id_and_key_of(reference: str) -> tuple[bytes, PublicKeyTypes | PSSPublicKey]:
    """The id and the public key in a reference that this module wrote.

    Of a key that is bound to PSS, the digest is told, and not what else it is bound to.
    """
    content = base64.b64decode("".join(reference.splitlines()[1:-1]))
    kind, end = content[1], 2 + hashlib.sha256().digest_size
    identity, rest, fields = content[2:end], content[end:], []
    while rest:
        length = int.from_bytes(rest[:2], "big")
        fields.append(rest[2 : 2 + length])
        rest = rest[2 + length :]
    if kind in (_RSA, _RSA_PSS):
        n, e = (int.from_bytes(field, "big") for field in fields[:2])
        key = rsa.RSAPublicNumbers(e, n).public_key()
        if kind == _RSA:
            return identity, key
        return identity, PSSPublicKey(key, Binding(b"", fields[2].decode() if fields[2:] else None))
    if kind == _EC:
        curve, point = _CURVES[fields[0].decode()], fields[1]
        return identity, ec.EllipticCurvePublicKey.from_encoded_point(curve, point)
    if kind == _ED25519:
        return identity, ed25519.Ed25519PublicKey.from_public_bytes(fields[0])
    name = next(name for name, number in _ML_DSA.items() if number == kind)
    return identity, mldsa.KEY_TYPES[name][1].from_public_bytes(fields[0])  # type: ignore[attr-defined]


def _fields(key: PublicKeyTypes | PSSPublicKey) -> tuple[int, tuple[bytes, ...]]:
    if isinstance(key, PSSPublicKey):
        _, modulus_and_exponent = _fields(key.key)
        bound_to = key.binding.digest
        digest = () if bound_to is None else (bound_to.encode(),)
        return _RSA_PSS, (*modulus_and_exponent, *digest)
    if isinstance(key, rsa.RSAPublicKey):
        if not 2048 <= key.key_size <= 8192:
            raise UnsupportedKey(f"an RSA key of {key.key_size} bits (2048 to 8192 are served)")
        numbers = key.public_numbers()
        return _RSA, (_unsigned(numbers.n), _unsigned(numbers.e))
    if isinstance(key, ec.EllipticCurvePublicKey):
        group = _GROUP_NAMES.get(key.curve.name)
        if group is None:
            raise UnsupportedKey(f"an EC key on {key.curve.name} (P-256, P-384, P-521 are served)")
        point = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        return _EC, (group.encode(), point)
    if isinstance(key, ed25519.Ed25519PublicKey):
        return _ED25519, (key.public_bytes_raw(),)
    if (parameter_set := mldsa.parameter_set(key)) is not None:
        octets: bytes = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
        return _ML_DSA[parameter_set], (octets,)
    raise UnsupportedKey(f"{kind_of_key(key)} ({SERVED_KEYS} are served)")


def _unsigned(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 7) // 8, "big")
