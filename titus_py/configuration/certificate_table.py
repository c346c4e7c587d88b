"""The keys of [[vhost]] for its certificates: defaults and descriptions.

``docs/reference.py`` writes the reference from this file, by way of ``tables``.
"""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from keyd.token.uri import parse
from titus_py.configuration.paths import Directory, File, KeyPlace, TokenUri, Upstream
from titus_py.configuration.table import Table

__all__ = ["Certificate", "Credential", "Credentials", "credential_of", "load_seconds"]

#: Some hundred times as many on a machine that has nothing else to do.
_OF_A_DIRECTORY_EACH_SECOND = 50


class Credential(NamedTuple):
    """The files of one certificate and its key: absolute paths."""

    certificate: Path
    #: None if the key is in no file: a token has it, or other hosts, or a keyd that titus-py does
    #: not start.
    key: Path | None
    passphrase_file: Path | None
    #: The ``certificate_dir`` in which they were found; None if the configuration names them.
    directory: Path | None = None
    #: The URI of the key, if it is in a token.
    token: str | None = None
    #: Whether other hosts have the key ([keyd] upstream).
    upstream: bool = False

    @property
    def secrets(self) -> list[Path]:
        """The files that nobody else is to read."""
        pin = parse(self.token).pin_file if self.token else None
        return [path for path in (self.key, self.passphrase_file, pin and Path(pin)) if path]


def load_seconds(credentials: Collection[Credential]) -> float:
    """How long it may take to read these at most, beside the time for anything at all.

    Decrypting a key may be made slow on purpose. Those of a directory are not encrypted.
    """
    named = sum(one.directory is None for one in credentials)
    return named + (len(credentials) - named) / _OF_A_DIRECTORY_EACH_SECOND


def credential_of(
    certificate: Path, key: Path | TokenUri | Upstream | None, passphrase_file: Path | None
) -> Credential:
    if isinstance(key, Upstream):
        return Credential(certificate, None, passphrase_file, upstream=True)
    if isinstance(key, TokenUri):
        return Credential(certificate, None, passphrase_file, token=str(key))
    return Credential(certificate, key, passphrase_file)


def _described(table: type[Table], key: str) -> str:
    return table.model_fields[key].description or ""


class Certificate(Table):
    """[[vhost.certificates]]: one of several certificates of a virtual host."""

    certificate: File = Field(
        description="The certificate in PEM, followed by the rest of its chain. What else the file "
        "holds (the key, perhaps) is not looked at, but nothing in it may be cut off."
    )
    key: KeyPlace | None = Field(
        default=None,
        description="The certificate's private key in PEM, which only keyd reads; or the URI of a "
        'key in a token, "pkcs11:token=…;object=…?module-path=…&pin-source=file:…"; or "upstream", '
        "for a key that other hosts have (keyd.upstream): which one, the certificate says. Absent "
        "where keyd.socket names a keyd that has it already.",
    )
    passphrase_file: File | None = Field(
        default=None, description="A file whose first line is the passphrase of an encrypted key."
    )


class Credentials(Table):
    """The part of [[vhost]] that names what it shows to clients."""

    certificate: File | None = Field(
        default=None,
        description=_described(Certificate, "certificate") + " Absent where there are several: "
        "[[vhost.certificates]].",
    )
    key: KeyPlace | None = Field(default=None, description=_described(Certificate, "key"))
    passphrase_file: File | None = Field(
        default=None, description=_described(Certificate, "passphrase_file")
    )
    certificates: tuple[Certificate, ...] = Field(
        default=(),
        description="Several certificates for the same names, one for each kind of key (RSA, "
        "ECDSA, Ed25519, ML-DSA), instead of certificate and key: tables headed "
        "[[vhost.certificates]], each with certificate, key and, if need be, passphrase_file. A "
        "client is shown the first that it can verify: ML-DSA, then ECDSA, then Ed25519, then RSA.",
    )

    certificate_dir: Directory | None = Field(
        default=None,
        description="A directory of certificates with their keys, instead of sni, certificate and "
        "key: each subdirectory with fullchain.pem and privkey.pem, as certbot's "
        "/etc/letsencrypt/live has them, and each file NAME.pem with both. This virtual host then "
        "takes the names of these certificates; of two for one name, the one that is valid for "
        "longer is shown.",
    )

    @property
    def credentials(self) -> dict[str, Credential]:
        """By the place of their keys within [[vhost]]: "", or ``certificates[0].``, and so on.

        Not those of a directory.
        """
        places: dict[str, Credentials | Certificate] = {"": self}
        places |= {f"certificates[{i}].": one for i, one in enumerate(self.certificates)}
        return {
            place: credential_of(one.certificate, one.key, one.passphrase_file)
            for place, one in places.items()
            if one.certificate is not None
        }
