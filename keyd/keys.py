"""Private keys, read from files.

Runs in keyd, before it gives its privileges up, and in the short-lived ``keyd check``, so
that no other program needs to open a key to judge it. Files come from the
administrator: trusted, but mistakes are to be named.
"""

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from keyd.powers import PrivateKey
from keyd.reference import UnsupportedKey, reference_pem

__all__ = ["UnusableKey", "load_private_key", "read"]


class UnusableKey(ValueError):
    """A key that cannot be used; ``field`` names the setting to look at."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason


def load_private_key(path: str, passphrase_file: str | None) -> PrivateKey:
    """Read a PEM private key; raises UnusableKey, also for a passphrase that it has not."""
    passphrase = None
    if passphrase_file is not None:
        # One line, as `openssl -passin file:` has it; the newline is not part of it.
        text = read(passphrase_file, "passphrase_file")
        passphrase = text.split(b"\n", 1)[0].rstrip(b"\r")
        if not passphrase:
            raise UnusableKey("passphrase_file", f"{passphrase_file}: its first line is empty")
    pem = read(path, "key")
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


def read(path: str, field: str) -> bytes:
    """A file that this setting names; raises UnusableKey."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnusableKey(field, f"{path}: {error.strerror}") from None
