"""The beginning of a private key in a file, where its kind is, which the library does not tell.

Run where keys are read from files. The library takes an RSA key that is bound to PSS for a plain
one, and does not read ML-DSA keys as openssl(1) writes them. Of an encrypted file, the beginning
alone is decrypted once more (RFC 8018: PBES2, with PBKDF2 or scrypt, and AES-CBC, as openssl(1)
writes it).
"""

import base64
import hashlib

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC

from keyd.der import content, members

__all__ = ["beginning"]

#: The version, and an AlgorithmIdentifier that is bound to one digest, have 70 octets and more. Of
#: an RSA key, the modulus follows; of ML-DSA keys, the seed, and the beginning of the expanded key.
_OCTETS = 128
_PBES2 = bytes.fromhex("06092a864886f70d01050d")
_PBKDF2 = bytes.fromhex("06092a864886f70d01050c")
_SCRYPT = bytes.fromhex("06092b06010401da47040b")
_SHA1 = bytes.fromhex("06082a864886f70d0207")
_PSEUDORANDOM = {
    _SHA1: "sha1",
    bytes.fromhex("06082a864886f70d0208"): "sha224",
    bytes.fromhex("06082a864886f70d0209"): "sha256",
    bytes.fromhex("06082a864886f70d020a"): "sha384",
    bytes.fromhex("06082a864886f70d020b"): "sha512",
}
#: Octets of the key, by cipher.
_AES_CBC = {
    bytes.fromhex("06096086480165030401" + last): octets
    for last, octets in (("02", 16), ("16", 24), ("2a", 32))
}
_SCRYPT_MAX_OCTETS = 256 * 1024 * 1024
_BEGIN = b"-----BEGIN PRIVATE KEY-----"
_BEGIN_ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"


def beginning(pem: bytes, passphrase: bytes | None) -> bytes:
    """The first 128 octets of the PKCS #8 in it; none if none can be read or decrypted."""
    try:
        if passphrase is None:
            return base64.b64decode(pem.partition(_BEGIN)[2].partition(b"-----")[0])[:_OCTETS]
        der = base64.b64decode(pem.partition(_BEGIN_ENCRYPTED)[2].partition(b"-----")[0])
        scheme, encrypted = members(der)
        kind, parameters = members(scheme)
        derivation, cipher = members(parameters)
        cipher_kind, vector = members(cipher)
        if kind != _PBES2 or cipher_kind not in _AES_CBC:
            return b""
        key = _derive(derivation, passphrase, _AES_CBC[cipher_kind])
        decryptor = Cipher(AES(key), CBC(bytes(content(vector)))).decryptor()
        return decryptor.update(bytes(content(encrypted))[:_OCTETS])
    except (ValueError, LookupError, OverflowError, MemoryError, StopIteration):
        return b""


def _derive(derivation: bytes, passphrase: bytes, octets: int) -> bytes:
    """Raises ValueError for what is none of the two."""
    kind, parameters = members(derivation)
    salt, *rest = members(parameters)
    salt = bytes(content(salt))
    if kind == _SCRYPT:
        cost, block, parallel = (int.from_bytes(content(one), "big") for one in rest[:3])
        return hashlib.scrypt(
            passphrase, salt=salt, n=cost, r=block, p=parallel, dklen=octets,
            maxmem=_SCRYPT_MAX_OCTETS,
        )  # fmt: skip
    if kind != _PBKDF2:
        raise ValueError("a derivation that is not known")
    # The length of the key may be named; and the function, unless it is HMAC-SHA-1 (RFC 8018 §A.2).
    iterations = int.from_bytes(content(rest[0]), "big")
    named = [next(members(one)) for one in rest[1:] if one[0] == 0x30]
    return hashlib.pbkdf2_hmac(
        _PSEUDORANDOM[named[0] if named else _SHA1], passphrase, salt, iterations, octets
    )
