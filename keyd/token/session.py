"""Signing with a token: the vendor's module, a session, and the keys in it.

Runs in the process that has the module, confined (``keyd.token.minder``), and in no other. It
reads keyd's questions. The module is the vendor's, and native code: whatever it does, it does it
here. It is reached through python-pkcs11.
"""

import os
import select
import socket
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import pkcs11
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)
from cryptography.x509 import load_der_x509_certificate
from pkcs11 import (
    Attribute,
    KeyType,
    Mechanism,
    ObjectClass,
    TokenFlag,
    _pkcs11,  # noqa: F401 - pkcs11.lib would load it later, when this process can read no file of ours
)

from keyd.protocol import SignatureScheme
from keyd.token.messages import Answer, Down, Failure, Nonsense, Question, Ready
from keyd.token.progress import Progress

__all__ = ["SAID", "SAID_FOR_GOOD", "Wanted", "serve"]

#: Exit codes: keyd has been told why; and trying again might lock the token. A module that ends its
#: process has codes of its own, and has told nobody.
SAID, SAID_FOR_GOOD = 101, 102

#: How long the module may take for one operation, and to log in: a small one has to load its keys.
OPERATION_SECONDS, LOGIN_SECONDS = 5.0, 30.0
_MAX_QUESTION_OCTETS = 128
#: How often to ask whether the token is still there, while there is nothing else to do.
_LOOK_SECONDS = 5.0
#: What the PKCS #1 v1.5 padding has before a digest (RFC 8017 §9.2, note 1), by its length.
_DIGEST_INFO = {
    32: bytes.fromhex("3031300d060960864801650304020105000420"),
    48: bytes.fromhex("3041300d060960864801650304020205000430"),
    64: bytes.fromhex("3051300d060960864801650304020305000440"),
}
_PSS = {
    32: (Mechanism.SHA256, pkcs11.MGF.SHA256, 32),
    48: (Mechanism.SHA384, pkcs11.MGF.SHA384, 48),
    64: (Mechanism.SHA512, pkcs11.MGF.SHA512, 64),
}
#: What is wrong with one question, and not with the session.
_ONLY_THIS_ONE = (
    pkcs11.MechanismInvalid,
    pkcs11.MechanismParamInvalid,
    pkcs11.KeySizeRange,
    pkcs11.FunctionNotSupported,
    pkcs11.DataLenRange,
    pkcs11.exceptions.KeyTypeInconsistent,
    pkcs11.exceptions.FunctionRejected,
)
_WRONG_PIN = (
    pkcs11.PinIncorrect,
    pkcs11.PinInvalid,
    pkcs11.PinLenRange,
    pkcs11.PinLocked,
    pkcs11.PinExpired,
)


#: CKA_EC_PARAMS of the curves that are served, as OIDs: how many octets of a digest are signed.
_ORDER_OCTETS = {
    bytes.fromhex("06082a8648ce3d030107"): 32,
    bytes.fromhex("06052b81040022"): 48,
    bytes.fromhex("06052b81040023"): 66,
}


class Wanted(NamedTuple):
    """The token, and its keys as (CKA_LABEL, CKA_ID); None matches anything."""

    module: str
    token: str | None
    manufacturer: str | None
    model: str | None
    serial: str | None
    keys: tuple[tuple[str | None, bytes | None], ...]


class _Unusable(Exception):
    def __init__(self, why: str, lasting: bool = False) -> None:
        super().__init__(why)
        self.lasting = lasting


def serve(wanted: Wanted, pin: str | None, keyd: socket.socket, progress: Progress) -> NoReturn:
    """Log in, and answer keyd's questions until it ends or the session is lost; then exit.

    The exit code is SAID, SAID_FOR_GOOD, or 0 where keyd has ended. ``progress`` is told what the
    module does.
    """
    try:
        progress.busy(LOGIN_SECONDS)
        token, keys = _log_in(wanted, pin)
        progress.idle()
        keyd.send(Ready(tuple(said for _, said in keys)).encode())
        _answer([key for key, _ in keys], token, keyd, progress)
        # Some tokens have few sessions, and do not see that a process has ended.
        pkcs11.lib(wanted.module).finalize()
    except _Unusable as error:
        keyd.send(Down(error.lasting, str(error)).encode())
        os._exit(SAID_FOR_GOOD if error.lasting else SAID)
    except pkcs11.exceptions.PKCS11Error as error:
        keyd.send(Down(False, _named(error)).encode())
        os._exit(SAID)
    except OSError:
        # keyd has ended.
        os._exit(0)
    os._exit(0)


def _named(error: RuntimeError) -> str:
    """The error by its name in the library: that of PKCS #11, without CKR and underscores."""
    said = ", ".join(str(argument) for argument in error.args)
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _log_in(wanted: Wanted, pin: str | None) -> tuple[Any, list[tuple[Any, bytes | str]]]:
    """A session: the token and, for each key, its handle, and its public part or what is wrong."""
    try:
        module = pkcs11.lib(wanted.module)
    except RuntimeError as error:
        why = _named(error)
        if isinstance(error, pkcs11.exceptions.PKCS11Error):
            # It was loaded, and did not begin.
            why += ": does it open what token_paths (--token-path) does not name?"
        raise _Unusable(f"the module {wanted.module} cannot be used: {why}") from None
    token = _find_token(module, wanted)
    if pin is not None:
        if token.flags & (TokenFlag.USER_PIN_LOCKED | TokenFlag.USER_PIN_FINAL_TRY):
            why = "its PIN is locked, or would be by one more wrong try: log in by hand first"
            raise _Unusable(why, lasting=True)
    elif token.flags & TokenFlag.LOGIN_REQUIRED:
        raise _Unusable("it wants a PIN: name its file in the URI (pin-source=)", lasting=True)
    try:
        session = token.open(user_pin=pin)
    except _WRONG_PIN as error:
        raise _Unusable(f"its PIN was not taken ({_named(error)})", lasting=True) from None
    return token, [_find_key(session, *key) for key in wanted.keys]


def _find_token(module: Any, wanted: Wanted) -> Any:
    found = []
    failed = None
    for slot in module.get_slots(token_present=True):
        try:
            token = slot.get_token()
        except (pkcs11.TokenNotPresent, pkcs11.TokenNotRecognised):
            continue
        except pkcs11.exceptions.PKCS11Error as error:
            # Another's may fail as it likes. If it is this one, it is said what with.
            failed = error
            continue
        has = token.label, token.manufacturer_id, token.model, token.serial
        asked = wanted[1:5]
        said = [one.decode(errors="replace") if isinstance(one, bytes) else one for one in has]
        if all(one is None or one == two.strip() for one, two in zip(asked, said, strict=True)):
            found.append(token)
    if not found:
        raise failed or _Unusable("there is no such token")
    if len(found) > 1:
        raise _Unusable(f"there are {len(found)} such tokens: add serial= to the URI")
    return found[0]


def _find_key(session: Any, label: str | None, identifier: bytes | None) -> tuple[Any, bytes | str]:
    """The private key's handle, and the DER of its public part, empty if the token has none."""
    about: dict[Attribute, Any] = {}
    if label is not None:
        about[Attribute.LABEL] = label
    if identifier is not None:
        about[Attribute.ID] = identifier
    keys = list(session.get_objects({Attribute.CLASS: ObjectClass.PRIVATE_KEY, **about}))
    if not keys:
        return None, "is not in the token: there is no such private key"
    if len(keys) > 1:
        return None, f"is the name of {len(keys)} private keys: add id= to the URI"
    return keys[0], _public_part(session, keys[0], about)


def _public_part(session: Any, key: Any, about: Mapping[Attribute, Any]) -> bytes:
    """From the public key beside the private one, or else from a certificate there."""
    for kind in (ObjectClass.PUBLIC_KEY, ObjectClass.CERTIFICATE):
        for found in list(session.get_objects({Attribute.CLASS: kind, **about})):
            try:
                if kind is ObjectClass.CERTIFICATE:
                    public = load_der_x509_certificate(found[Attribute.VALUE]).public_key()
                elif key.key_type == KeyType.RSA:
                    e = int.from_bytes(found[Attribute.PUBLIC_EXPONENT], "big")
                    n = int.from_bytes(found[Attribute.MODULUS], "big")
                    public = rsa.RSAPublicNumbers(e, n).public_key()
                else:
                    public = _ec_public(found[Attribute.EC_PARAMS], found[Attribute.EC_POINT])
                return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            except (ValueError, pkcs11.exceptions.PKCS11Error):
                continue
    return b""


def _ec_public(parameters: bytes, point: bytes) -> Any:
    """From CKA_EC_PARAMS and CKA_EC_POINT: an OCTET STRING, and of some modules the point alone."""
    if point[:1] == b"\x04" and len(point) in (67, 99, 136):
        point = point[2 if point[1] < 0x80 else 3 :]
    algorithm = bytes.fromhex("06072a8648ce3d0201") + parameters
    key = _der(0x30, algorithm) + _der(0x03, b"\0" + point)
    return load_der_public_key(_der(0x30, key))


def _der(tag: int, content: bytes) -> bytes:
    if len(content) < 0x80:
        return bytes((tag, len(content))) + content
    length = len(content).to_bytes(2, "big").lstrip(b"\0")
    return bytes((tag, 0x80 | len(length))) + length + content


def _answer(keys: list[Any], token: Any, keyd: socket.socket, progress: Progress) -> None:
    """Answer until keyd ends; raises what the library does where the session is lost."""
    poll = select.poll()
    poll.register(keyd, select.POLLIN)
    while True:
        if not poll.poll(_LOOK_SECONDS * 1000):
            progress.busy(OPERATION_SECONDS)
            if token.slot.get_token().serial != token.serial:
                raise _Unusable("another token is in its place")
            progress.idle()
            continue
        message = keyd.recv(_MAX_QUESTION_OCTETS)
        if not message:
            return
        try:
            question = Question.decode(message)
        except Nonsense:
            continue
        if question.deadline_ms < time.monotonic() * 1000 or question.key >= len(keys):
            continue
        progress.busy(OPERATION_SECONDS)
        try:
            signature = _sign(keys[question.key], question)
        except _ONLY_THIS_ONE as error:
            keyd.send(Failure(question.number, _named(error)).encode())
        else:
            keyd.send(Answer(question.number, signature).encode())
        progress.idle(answers=1)


def _sign(key: Any, question: Question) -> bytes:
    """Sign as the scheme says: hashing is done, padding is left to the token but for v1.5's."""
    digest = question.digest
    name = SignatureScheme(question.scheme).name
    if name.startswith("ecdsa"):
        # The leftmost bits of the digest, as many as the order has (FIPS 186-5 §6.4.1).
        most = _ORDER_OCTETS.get(key[Attribute.EC_PARAMS])
        signature: bytes = key.sign(digest[:most], mechanism=Mechanism.ECDSA)
        half = len(signature) // 2
        r, s = (int.from_bytes(part, "big") for part in (signature[:half], signature[half:]))
        return encode_dss_signature(r, s)
    if name.startswith("rsa_pkcs1"):
        padded: bytes = key.sign(_DIGEST_INFO[len(digest)] + digest, mechanism=Mechanism.RSA_PKCS)
        return padded
    form = _PSS[len(digest)]
    pss: bytes = key.sign(digest, mechanism=Mechanism.RSA_PKCS_PSS, mechanism_param=form)
    return pss
