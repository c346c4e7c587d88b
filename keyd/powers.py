"""keyd's whole power: what it will do with a private key, and for what octets.

Runs in keyd, and trusts nobody. An attacker may control the worker that sends a
request. So the octets to be signed are parsed here, and anything that a TLS server
would not sign is refused, or with a key that is granted as a client's, a TLS client.
Padding is chosen here, never by the worker.
"""

import hmac
import secrets
from collections.abc import Callable, Set
from functools import cache, partial
from typing import NamedTuple

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keyd import mldsa
from keyd.client_hello import ClientHello
from keyd.protocol import PREMASTER_SECRET_OCTETS, Operation, Power, Request, SignatureScheme
from keyd.pss import PSSPrivateKey, PSSPublicKey

__all__ = [
    "ALL_POWERS",
    "Client",
    "Key",
    "KeyElsewhere",
    "Later",
    "LibraryKey",
    "NotGranted",
    "NotTLS",
    "PrivateKey",
    "Told",
    "Whole",
    "may_ask",
    "perform",
    "rehearse",
    "takes_milliseconds",
]

#: Keys as the library has them.
LibraryKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
PrivateKey = LibraryKey | PSSPrivateKey

#: Called once with a signature, or with why there is none.
Told = Callable[[bytes | str], None]
#: Asks for what cannot be had at once.
Later = Callable[[Told], None]


class Whole(NamedTuple):
    """A request with all that it was judged by."""

    request: Request
    granted: frozenset[Power]
    #: The message that the parent has seen; empty where nobody has, or where no key needs it.
    client_hello: bytes
    #: Until when an answer is of use, as time.monotonic() has it.
    deadline: float


class KeyElsewhere:
    """A key that another process has, which signs with it for keyd. It never decrypts.

    No abstract class: each request is asked whether it is for such a key, and a look at those takes
    long.
    """

    def public_key(self) -> PublicKeyTypes | PSSPublicKey:
        """The public part; raises LookupError while it is not known."""
        raise NotImplementedError

    def ask(self, scheme: SignatureScheme, octets: bytes, told: Told) -> None:
        """Have octets signed that have been checked. Never blocks."""
        raise NotImplementedError

    def within(self, whole: Whole) -> "KeyElsewhere":
        """The key for this request alone, where whoever has it judges the request again."""
        del whole
        return self


Key = PrivateKey | KeyElsewhere


class Client(NamedTuple):
    """Whose handshake it is: what the parent has seen of it, and what came of that.

    ``transcript_hash`` is that of TLS 1.3, computed by keyd from all messages up to the
    Certificate; None if they have not come.
    """

    hello: ClientHello
    transcript_hash: bytes | None


class NotTLS(ValueError):
    """Octets, or a scheme for them, that no TLS server or client would use this key for."""


class NotGranted(ValueError):
    """Octets that some TLS server or client would use this key for, and this one does not."""


@cache
def may_ask(operation: Operation, granted: Set[Power]) -> bool:
    """Whether there is anything that this operation may be asked for."""
    return not _POWERS_OF[operation].isdisjoint(granted)


def perform(
    operation: Operation,
    key: Key,
    parameter: int,
    payload: bytes,
    granted: Set[Power],
    client: Client | None,
) -> bytes | Later:
    """Perform the operation; raises NotTLS, or NotGranted for what only other powers allow.

    ``client`` is None if nobody has seen what it said. With a key that is
    elsewhere, everything is checked, and the result is what asks for it. This may take
    milliseconds: the caller is one of several threads.
    """
    if operation is Operation.SIGN:
        return _sign(key, parameter, payload, granted, client)
    if Power.DECRYPT not in granted:
        raise NotGranted("for TLS 1.2's RSA key exchange")
    return _decrypt(key, parameter, payload)


def takes_milliseconds(key: Key | None) -> bool:
    """Whether others should be heard before this key signs; it does so without Python's lock.

    Of our own keys, those on P-256 and of Ed25519 are quick. The others take 0.2 to 3 ms.
    """
    kind: type = type(key)
    if _is_of(ec.EllipticCurvePrivateKey, kind):
        return key.curve.name != _QUICK_CURVE  # type: ignore[union-attr]
    return _is_slow(kind)


def rehearse(key: PrivateKey) -> None:
    """Use a key once for what keys of its kind will be used for.

    This makes the library load now what it would load late: in keyd's empty root, there is
    nothing to load it from.
    """
    octets = _TLS13_SERVER + bytes(32)
    for name, scheme in _SCHEMES.items():
        if scheme.tls13 and isinstance(key, scheme.key_type):
            if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name != scheme.curve:
                continue
            if isinstance(key, PSSPrivateKey) and key.binding.digest not in (None, scheme.digest):
                continue
            perform(Operation.SIGN, key, name, octets, ALL_POWERS, None)
    for curve in _CURVES.values():
        one = ec.derive_private_key(1, curve).public_key()
        point = one.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        ec.EllipticCurvePublicKey.from_encoded_point(curve, point)
    if isinstance(key, rsa.RSAPrivateKey):
        ciphertext = b"\x01" * ((key.key_size + 7) // 8)
        perform(Operation.DECRYPT, key, 0x0303, ciphertext, ALL_POWERS, None)


#: All that a server's key may be granted.
ALL_POWERS = frozenset(Power) - {Power.SIGN_TLS13_CLIENT}
_POWERS_OF = {
    Operation.SIGN: frozenset(Power) - {Power.DECRYPT},
    Operation.DECRYPT: {Power.DECRYPT},
}


# --- sign -----------------------------------------------------------------------

#: RFC 8446 §4.4.3.
_TLS13_SERVER = b"\x20" * 64 + b"TLS 1.3, server CertificateVerify\x00"
#: What a client signs in TLS 1.2 are all messages of the handshake, which have no form that tells
#: them from anything else: only TLS 1.3.
_TLS13_CLIENT = b"\x20" * 64 + b"TLS 1.3, client CertificateVerify\x00"
#: The transcript hash is the cipher suite's, not the signature scheme's: SHA-256 or
#: SHA-384 in every suite of RFC 8446 §B.4.
_TRANSCRIPT_HASH_OCTETS = frozenset({32, 48})

#: client_random and server_random, then ServerECDHParams (RFC 8422 §5.4).
_CLIENT_RANDOM_OCTETS, _RANDOMS_OCTETS = 32, 64
#: The end of the server_random of a server that speaks TLS 1.3 and negotiates TLS 1.2 (RFC 8446
#: §4.1.3). A client that speaks TLS 1.3 aborts such a handshake.
_DOWNGRADE = b"DOWNGRD\x01"
_NAMED_CURVE = 3
_X448 = 30
#: NamedGroup -> octets of its point: the NIST curves uncompressed, X25519, X448.
_POINT_OCTETS = {23: 65, 24: 97, 25: 133, 29: 32, _X448: 56}
_CURVES: dict[int, ec.EllipticCurve] = {
    23: ec.SECP256R1(),
    24: ec.SECP384R1(),
    25: ec.SECP521R1(),
}
_QUICK_CURVE = "secp256r1"


_PUBLIC: dict[type, type] = {
    rsa.RSAPrivateKey: rsa.RSAPublicKey,
    ec.EllipticCurvePrivateKey: ec.EllipticCurvePublicKey,
    ed25519.Ed25519PrivateKey: ed25519.Ed25519PublicKey,
    PSSPrivateKey: PSSPublicKey,
    **dict(mldsa.KEY_TYPES.values()),
}


class _Scheme(NamedTuple):
    key_type: type
    sign: Callable[..., bytes]
    curve: str | None = None
    tls13: bool = True
    tls12: bool = True
    #: Of a scheme for keys that may be bound to one.
    digest: str | None = None


def _pkcs1(algorithm: hashes.HashAlgorithm) -> _Scheme:
    def sign(key: rsa.RSAPrivateKey, octets: bytes) -> bytes:
        return key.sign(octets, padding.PKCS1v15(), algorithm)

    return _Scheme(rsa.RSAPrivateKey, sign, tls13=False)


def _pss(algorithm: hashes.HashAlgorithm) -> _Scheme:
    form = padding.PSS(padding.MGF1(algorithm), algorithm.digest_size)

    def sign(key: rsa.RSAPrivateKey, octets: bytes) -> bytes:
        return key.sign(octets, form, algorithm)

    return _Scheme(rsa.RSAPrivateKey, sign)


def _bound_pss(algorithm: hashes.SHA256 | hashes.SHA384 | hashes.SHA512) -> _Scheme:
    form = padding.PSS(padding.MGF1(algorithm), algorithm.digest_size)

    def sign(key: PSSPrivateKey, octets: bytes) -> bytes:
        return key.key.sign(octets, form, algorithm)

    return _Scheme(PSSPrivateKey, sign, digest=algorithm.name)


def _ecdsa(curve: str, algorithm: hashes.HashAlgorithm) -> _Scheme:
    form = ec.ECDSA(algorithm)

    def sign(key: ec.EllipticCurvePrivateKey, octets: bytes) -> bytes:
        return key.sign(octets, form)

    return _Scheme(ec.EllipticCurvePrivateKey, sign, curve)


def _mldsa(parameter_set: str) -> _Scheme:
    # Where the library has no such keys, none is of this type.
    key_type, _ = mldsa.KEY_TYPES.get(parameter_set, (type(None), None))
    return _Scheme(key_type, lambda key, octets: key.sign(octets), tls12=False)


_SCHEMES = {
    SignatureScheme.rsa_pkcs1_sha256: _pkcs1(hashes.SHA256()),
    SignatureScheme.rsa_pkcs1_sha384: _pkcs1(hashes.SHA384()),
    SignatureScheme.rsa_pkcs1_sha512: _pkcs1(hashes.SHA512()),
    SignatureScheme.rsa_pss_rsae_sha256: _pss(hashes.SHA256()),
    SignatureScheme.rsa_pss_rsae_sha384: _pss(hashes.SHA384()),
    SignatureScheme.rsa_pss_rsae_sha512: _pss(hashes.SHA512()),
    SignatureScheme.rsa_pss_pss_sha256: _bound_pss(hashes.SHA256()),
    SignatureScheme.rsa_pss_pss_sha384: _bound_pss(hashes.SHA384()),
    SignatureScheme.rsa_pss_pss_sha512: _bound_pss(hashes.SHA512()),
    SignatureScheme.ecdsa_secp256r1_sha256: _ecdsa("secp256r1", hashes.SHA256()),
    SignatureScheme.ecdsa_secp384r1_sha384: _ecdsa("secp384r1", hashes.SHA384()),
    SignatureScheme.ecdsa_secp521r1_sha512: _ecdsa("secp521r1", hashes.SHA512()),
    SignatureScheme.mldsa44: _mldsa("ML-DSA-44"),
    SignatureScheme.mldsa65: _mldsa("ML-DSA-65"),
    SignatureScheme.mldsa87: _mldsa("ML-DSA-87"),
    SignatureScheme.ed25519: _Scheme(
        ed25519.Ed25519PrivateKey, lambda key, octets: key.sign(octets)
    ),
}

#: By number. To ask the enumeration takes three times as long.
_NAMES = {int(name): name for name in _SCHEMES}


def _sign(
    key: Key,
    parameter: int,
    octets: bytes,
    granted: Set[Power],
    client: Client | None,
) -> bytes | Later:
    name = _NAMES.get(parameter)
    if name is None:
        raise NotTLS(f"signature scheme 0x{parameter:04x}")
    scheme = _SCHEMES[name]
    known = key.public_key() if isinstance(key, KeyElsewhere) else key
    kind: type = type(known)
    if not _is_of(scheme.key_type, kind):
        raise NotTLS(f"{name.name} with a key of another kind")
    # Schemes that name a digest or a curve are for no other kinds of keys than these.
    if (
        scheme.digest is not None
        and isinstance(known, PSSPrivateKey | PSSPublicKey)
        and known.binding.digest not in (None, scheme.digest)
    ):
        raise NotTLS(f"{name.name} with a key that is bound to {known.binding.digest}")
    as_client = Power.SIGN_TLS13_CLIENT in granted and octets.startswith(_TLS13_CLIENT)
    if as_client or octets.startswith(_TLS13_SERVER):
        length = len(octets) - len(_TLS13_SERVER)
        if length not in _TRANSCRIPT_HASH_OCTETS:
            raise NotTLS(f"a transcript hash of {length} octets")
        # TLS 1.3 ties the scheme to the curve, TLS 1.2 does not.
        if not scheme.tls13:
            raise NotTLS(f"{name.name} in TLS 1.3")
        if (
            scheme.curve is not None
            and isinstance(known, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey)
            and known.curve.name != scheme.curve
        ):
            raise NotTLS(f"{name.name} in TLS 1.3 with a key on {known.curve.name}")
        if not as_client and Power.SIGN_TLS13 not in granted:
            raise NotGranted("a CertificateVerify of TLS 1.3")
        if client is not None:
            _check_client_of_certificate_verify(octets, client)
    else:
        _check_server_key_exchange(octets, granted)
        if not scheme.tls12:
            raise NotTLS(f"{name.name} in TLS 1.2")
        if client is not None:
            _check_client_of_server_key_exchange(octets, granted, client.hello)
    if isinstance(key, KeyElsewhere):
        return partial(key.ask, name, octets)
    return scheme.sign(key, octets)


@cache
def _is_of(key_type: type, kind: type) -> bool:
    """Whether keys of this kind are of this type, or public keys of it.

    Asked once for each: the library's types are abstract, and a look at them takes long.
    """
    return issubclass(kind, (key_type, _PUBLIC.get(key_type, key_type)))


@cache
def _is_slow(kind: type) -> bool:
    """Whether all keys of this kind are. As above."""
    of_mldsa = (private for private, _ in mldsa.KEY_TYPES.values())
    return issubclass(kind, (rsa.RSAPrivateKey, PSSPrivateKey, *of_mldsa))


def _check_client_of_certificate_verify(octets: bytes, client: Client) -> None:
    """It is for this client's handshake."""
    if not client.hello.offers_tls13:
        raise NotTLS("a CertificateVerify of TLS 1.3 for a client that does not offer it")
    if client.transcript_hash is None:
        raise NotTLS("a CertificateVerify of a handshake whose messages have not come")
    if octets[len(_TLS13_SERVER) :] != client.transcript_hash:
        raise NotTLS("a CertificateVerify of another handshake than the one whose messages came")


def _check_server_key_exchange(octets: bytes, granted: Set[Power]) -> None:
    group = _group_of_server_key_exchange(octets)
    if granted.isdisjoint({Power.SIGN_TLS12, Power.SIGN_TLS12_MARKED}):
        raise NotGranted("a ServerKeyExchange of TLS 1.2")
    if group == _X448 and Power.SIGN_TLS12_X448 not in granted:
        raise NotGranted("a ServerKeyExchange of TLS 1.2 in X448")
    if Power.SIGN_TLS12 not in granted and octets[:_RANDOMS_OCTETS][-8:] != _DOWNGRADE:
        raise NotGranted("a ServerKeyExchange of TLS 1.2 without the mark of a downgrade")


def _check_client_of_server_key_exchange(
    octets: bytes, granted: Set[Power], hello: ClientHello
) -> None:
    """The parameters are for this client, and for a version that it gets."""
    if octets[:_CLIENT_RANDOM_OCTETS] != hello.random:
        raise NotTLS("a ServerKeyExchange with another random than the client's")
    if hello.offers_tls13 and Power.SIGN_TLS13 in granted:
        raise NotTLS("a ServerKeyExchange of TLS 1.2 for a client that offers TLS 1.3")


def _group_of_server_key_exchange(octets: bytes) -> int:
    """The NamedGroup of a ServerKeyExchange; raises NotTLS for anything else."""
    params = octets[_RANDOMS_OCTETS:]
    if len(params) < 4 or params[0] != _NAMED_CURVE:
        raise NotTLS(f"{len(octets)} octets that no TLS server signs")
    group, length = int.from_bytes(params[1:3], "big"), params[3]
    point = params[4:]
    if _POINT_OCTETS.get(group) != length or len(point) != length:
        raise NotTLS(f"a ServerKeyExchange of {len(point)} octets in group {group}")
    curve = _CURVES.get(group)
    if curve is None:
        return group
    if point[0] != 4:
        raise NotTLS("a ServerKeyExchange with a compressed point")
    # On the curve, one coordinate follows from the other. Were both free, a certificate
    # could be put into the shape of a ServerKeyExchange (the randoms are free anyway).
    try:
        ec.EllipticCurvePublicKey.from_encoded_point(curve, point)
    except ValueError:
        raise NotTLS(f"a ServerKeyExchange with a point off {curve.name}") from None
    return group


# --- decrypt --------------------------------------------------------------------


def _decrypt(key: Key, parameter: int, ciphertext: bytes) -> bytes:
    """The premaster secret, or random octets of the same length, after the same time.

    RFC 5246 §7.4.7.1: the answer does not tell whether padding and version were right.
    OpenSSL answers bad padding with a pseudo-random message (implicit rejection). What
    is left is to compare a length and a version, and to choose between two values. Both
    values are always computed, and always from the same number of octets
    (``bench/decrypt_timing.py`` measures it).
    """
    if not isinstance(key, rsa.RSAPrivateKey):
        raise NotTLS("an RSA key exchange with a key of another kind")
    substitute = secrets.token_bytes(PREMASTER_SECRET_OCTETS)
    try:
        secret = key.decrypt(ciphertext, padding.PKCS1v15())
    except ValueError:
        # The ciphertext is not as long as the modulus, or is a number above it. The sender knows
        # that already.
        return substitute
    padded = secret.ljust(len(ciphertext), b"\0")
    good = hmac.compare_digest(padded[:2], parameter.to_bytes(2, "big"))
    good &= len(secret) == PREMASTER_SECRET_OCTETS
    return (substitute, padded[:PREMASTER_SECRET_OCTETS])[good]
