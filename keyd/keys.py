"""Private keys, read from files.

Runs in titus-py's keyd, before it gives its privileges up, and in short-lived processes, so that no
other program needs to open a key: in the one that reads for a keyd of its own, and in ``keyd
check``. The files are the administrator's: they are trusted, but mistakes in them have to be named.
"""

import base64
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from keyd import mldsa
from keyd.key_kind import beginning
from keyd.powers import PrivateKey
from keyd.pss import PSSPrivateKey, binding_of_key
from keyd.reference import SERVED_KEYS, UnsupportedKey, kind_of_key, reference_pem

__all__ = [
    "Read",
    "UnusableKey",
    "as_bound",
    "load_private_key",
    "passphrase_in",
    "read",
    "read_ahead",
    "why_binary",
]

#: How PKCS #12 begins (RFC 7292 §4): a SEQUENCE, whatever its length, with version 3.
_PKCS12 = re.compile(
    rb"\x30(?:[\x00-\x80]|\x81.|\x82.{2}|\x83.{3}|\x84.{4})\x02\x01\x03\x30", re.DOTALL
)
#: Reads the file that a setting names, as ``read`` does.
Read = Callable[[str, str], bytes]


class UnusableKey(ValueError):
    """A key that cannot be used; ``field`` names the setting to look at."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason


def read(path: str, field: str, most: int = -1) -> bytes:
    """Read the file that this setting names, ``most`` octets of it; raises UnusableKey."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnusableKey(field, f"{path}: is no regular file")
            return file.read(most)
    except OSError as error:
        raise UnusableKey(field, f"{path}: {error.strerror}") from None


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting: for a pipe (fifo(7)), that would be until somebody writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_ahead(paths: Iterable[str]) -> Read:
    """Read these files now, all of them; returns what then stands for ``read``.

    For a process that is confined before it looks at what it has read.
    """
    found: dict[str, bytes | str] = {}
    for path in paths:
        try:
            found[path] = read(path, "")
        except UnusableKey as error:
            found[path] = error.reason

    def recall(path: str, field: str) -> bytes:
        content = found[path]
        if isinstance(content, str):
            raise UnusableKey(field, content)
        return content

    return recall


def load_private_key(path: str, passphrase_file: str | None, read: Read = read) -> PrivateKey:
    """Read a PEM private key; raises UnusableKey, also for a passphrase that it does not need."""
    passphrase = None
    if passphrase_file is not None:
        passphrase = passphrase_in(read(passphrase_file, "passphrase_file"))
        if not passphrase:
            raise UnusableKey("passphrase_file", f"{passphrase_file}: its first line is empty")
    pem = read(path, "key")
    try:
        # The library's own validation takes 0.2 s for 4096 bits: _is_sound() takes 3 ms.
        key = load_pem_private_key(pem, passphrase, unsafe_skip_rsa_key_validation=True)
    except TypeError:
        if passphrase is None:
            raise UnusableKey(
                "key", f"{path} is encrypted: set passphrase_file (--passphrase-file)"
            ) from None
        raise UnusableKey(
            "passphrase_file", f"{path} is not encrypted: remove passphrase_file"
        ) from None
    except UnsupportedAlgorithm as error:
        unknown = _unknown_to_library(pem, passphrase) or f"is of an unsupported kind: {error}"
        raise UnusableKey("key", f"{path} {unknown}") from None
    except ValueError as error:
        if found := mldsa.from_seed(beginning(pem, passphrase)):
            return found  # type: ignore[no-any-return]
        if unknown := _unknown_to_library(pem, passphrase):
            raise UnusableKey("key", f"{path} {unknown}") from None
        if reason := _why_unreadable(pem, str(error)):
            raise UnusableKey("key", f"{path} {reason}") from None
        if passphrase is not None:
            reason = f"{passphrase_file} does not decrypt {path}, or {path} is damaged"
            raise UnusableKey("passphrase_file", reason) from None
        raise UnusableKey("key", f"{path} holds a PEM private key that is damaged") from None
    if not (
        isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey)
        or mldsa.parameter_set(key)
    ):
        raise UnusableKey("key", f"{path} is {kind_of_key(key)}: {SERVED_KEYS} are served")
    if isinstance(key, rsa.RSAPrivateKey) and not _is_sound(key):
        raise UnusableKey("key", f"{path} is damaged: its numbers are not those of an RSA key")
    try:
        bound = as_bound(key, beginning(pem, passphrase))
        reference_pem(bound.public_key())
    except UnsupportedKey as error:
        raise UnusableKey("key", f"{path} is {error}") from None
    return bound


def as_bound(key: PrivateKeyTypes, written: bytes | memoryview) -> PrivateKey:
    """The key, bound to PSS if it was written so: the library takes it for a plain RSA key.

    ``written`` is PKCS #8 that is not encrypted, or the beginning of it. Raises UnsupportedKey for
    what no TLS server can use.
    """
    if not isinstance(key, rsa.RSAPrivateKey):
        return key  # type: ignore[return-value]
    try:
        binding = binding_of_key(written)
    except ValueError as error:
        raise UnsupportedKey(f"an RSA key bound to PSS that TLS cannot use: {error}") from None
    return key if binding is None else PSSPrivateKey(key, binding)


def _unknown_to_library(pem: bytes, passphrase: bytes | None) -> str:
    """What to say of a key whose kind or form this library does not know; nothing for others."""
    start = beginning(pem, passphrase)
    name = mldsa.name_of_identifier(start[:32])
    if name and not mldsa.KEY_TYPES:
        return f"is an {name} key, which this version of cryptography does not know"
    if mldsa.lacks_seed(start):
        return f"is an {name} key without the seed that it was made from, and cannot be read here"
    return ""


def passphrase_in(text: bytes) -> bytes:
    """The first line without its newline, as ``openssl -passin file:`` reads it."""
    return text.split(b"\n", 1)[0].rstrip(b"\r")


def _is_sound(key: rsa.RSAPrivateKey) -> bool:
    """Whether the numbers of a key belong together (RFC 8017 §3.2), and p and q are primes.

    The arithmetic comes first: the library may hang on numbers that fail it. A signature of
    random octets is a Fermat test of p and q: it verifies only where m**(p-1) is 1 modulo p, and
    likewise for q. A damaged number of this size does not pass that.
    """
    numbers = key.private_numbers()
    p, q, d = numbers.p, numbers.q, numbers.d
    public = numbers.public_numbers
    if not (
        p > 1
        and q > 1
        and p != q
        and public.e % 2
        and public.e > 1
        and p * q == public.n
        and d * public.e % (p - 1) == d * public.e % (q - 1) == 1
        and numbers.dmp1 == d % (p - 1)
        and numbers.dmq1 == d % (q - 1)
        and numbers.iqmp * q % p == 1
    ):
        return False
    digest, algorithm = secrets.token_bytes(SHA256.digest_size), Prehashed(SHA256())
    try:
        signature = key.sign(digest, padding.PKCS1v15(), algorithm)
        key.public_key().verify(signature, digest, padding.PKCS1v15(), algorithm)
    except (InvalidSignature, InternalError, ValueError):
        return False
    return True


def why_binary(content: bytes, command: str, from_pkcs12: str) -> str | None:
    """Of a file that is not PEM but DER: what makes PEM of it, with this command of openssl's."""
    if not content.startswith(b"\x30"):  # a SEQUENCE
        return None
    if _PKCS12.match(content):
        made = f"'openssl pkcs12 -in OLD {from_pkcs12} -out NEW'"
        return f"is PKCS #12 (.p12, .pfx), not PEM: take it out with {made}"
    made = f"'openssl {command} -inform DER -in OLD -out NEW'"
    return f"is binary (DER), not PEM: convert it with {made}"


def _why_unreadable(pem: bytes, said: str) -> str | None:
    """Why the library cannot read this key; None for damage or a wrong passphrase."""
    labels = [label.decode() for label in re.findall(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----", pem)]
    private = next((label for label in labels if label.endswith("PRIVATE KEY")), None)
    if private is None:
        if labels:
            return f"holds a {labels[0]}, and no private key"
        return why_binary(pem, "pkey", "-nocerts -noenc") or "holds no PEM private key"
    if private == "OPENSSH PRIVATE KEY":
        return "is in OpenSSH's format: convert a copy of it with 'ssh-keygen -p -m PEM -f COPY'"
    # What the library says of PKCS #8, and of OpenSSL's own encoding from before that.
    if said.startswith(("Unknown key encryption algorithm", "Key encrypted with unknown cipher")):
        return (
            "is encrypted with a cipher that cannot be read here: encrypt it with AES, with "
            "'openssl pkey -aes256 -out NEW'"
        )
    if private == "PRIVATE KEY" and _is_pkcs8_version_2(pem):
        return (
            "is in version 2 of PKCS #8, which holds the public key as well (RFC 5958 §2) and "
            "cannot be read here: have it exported in version 1"
        )
    return None


def _is_pkcs8_version_2(pem: bytes) -> bool:
    """Whether it is a SEQUENCE that begins with the INTEGER 1 (0 in version 1; RFC 5208 §5)."""
    base64_text = pem.partition(b"-----BEGIN PRIVATE KEY-----")[2].partition(b"-----")[0]
    try:
        der = base64.b64decode(base64_text)
    except ValueError:
        return False
    return re.match(rb"\x30(?:[\x00-\x7f]|\x81.|\x82..)\x02\x01\x01", der, re.DOTALL) is not None
