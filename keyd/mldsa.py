"""ML-DSA keys (FIPS 204), where the library has them, and their names where it does not.

Run wherever keys and certificates are read. TLS 1.3 alone signs with them
(draft-ietf-tls-mldsa). Debian 13's library does not know them: keys and certificates of these kinds
are named as what they are there, and not served.
"""

import re
from typing import Any

try:
    from cryptography.hazmat.primitives.asymmetric import mldsa as _library
except ImportError:
    _library = None  # type: ignore[assignment]

__all__ = [
    "KEY_TYPES",
    "PUBLIC_OCTETS",
    "from_seed",
    "lacks_seed",
    "name_of_identifier",
    "parameter_set",
]

#: By parameter set: the octets of the public key (FIPS 204 table 2).
PUBLIC_OCTETS = {"ML-DSA-44": 1312, "ML-DSA-65": 1952, "ML-DSA-87": 2592}
#: By parameter set, the private and the public key's type; nothing where the library has none.
KEY_TYPES: dict[str, tuple[type, type]] = {}
if _library is not None:
    KEY_TYPES = {
        "ML-DSA-44": (_library.MLDSA44PrivateKey, _library.MLDSA44PublicKey),
        "ML-DSA-65": (_library.MLDSA65PrivateKey, _library.MLDSA65PublicKey),
        "ML-DSA-87": (_library.MLDSA87PrivateKey, _library.MLDSA87PublicKey),
    }
#: RFC 9881 §2: the last octet of the object identifier is the parameter set's.
_OID = re.compile(bytes.fromhex("0609608648016503 0403".replace(" ", "")) + b"([\x11-\x13])")
#: The beginning of a private key in PKCS #8, up to the private part.
_KEY = rb"\x30\x82..\x02\x01\x00\x30\x0b" + _OID.pattern + rb"\x04\x82.."
#: RFC 9881 §6: the seed with the expanded key, which begins with what the public one begins with.
_BOTH = re.compile(_KEY + rb"\x30\x82..\x04\x20(.{32})\x04\x82..(.{32})", re.DOTALL)
_EXPANDED = re.compile(_KEY + rb"\x04\x82", re.DOTALL)
_BY_OCTET = dict(zip(b"\x11\x12\x13", PUBLIC_OCTETS, strict=True))


def parameter_set(key: Any) -> str | None:
    """Which one a private or public key has; None for a key of another kind."""
    return next((name for name, types in KEY_TYPES.items() if isinstance(key, types)), None)


def name_of_identifier(der: bytes) -> str | None:
    """The parameter set that is named in these octets, such as the beginning of a PKCS #8."""
    found = _OID.search(der)
    return _BY_OCTET[found[1][0]] if found else None


def from_seed(pkcs8: bytes) -> Any:
    """The key of a file that has its seed and the expanded key, as openssl(1) writes it.

    The library reads none but the seed alone. The first 128 octets of the PKCS #8 are enough. None
    for anything else, or where the two do not belong together.
    """
    found = _BOTH.match(pkcs8)
    if found is None or not KEY_TYPES:
        return None
    key_type: Any = KEY_TYPES[_BY_OCTET[found[1][0]]][0]
    key = key_type.from_seed_bytes(found[2])
    return key if key.public_key().public_bytes_raw().startswith(found[3]) else None


def lacks_seed(pkcs8: bytes) -> bool:
    """Whether it is such a key in the expanded form alone."""
    return _EXPANDED.match(pkcs8) is not None
