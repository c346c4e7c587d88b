"""The keys of [[vhost]] for client certificates: defaults and descriptions.

``docs/reference.py`` writes the reference from this file, by way of ``tables``.
"""

from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from titus_py.configuration.client_allow import ClientAllow
from titus_py.configuration.known_client_table import KnownClients
from titus_py.configuration.paths import File

__all__ = ["ClientCertificates", "ClientFiles"]


class ClientFiles(NamedTuple):
    """The files that say whose certificates are trusted: absolute paths.

    ``whose``: "clients", or of a tunnel "servers"; "system" if the file is not the administrator's.
    """

    ca: Path
    crl: Path | None
    whose: str = "clients"

    @property
    def paths(self) -> list[Path]:
        return [path for path in (self.ca, self.crl) if path is not None]

    def setting(self, field: str) -> str:
        """The setting that names the file: ``field`` is as it is in [[vhost]]."""
        return field if self.whose == "clients" else field.removeprefix("client_")


class ClientCertificates(KnownClients):
    """The part of [[vhost]] that says what is asked of clients."""

    client_certificates: Literal["required", "optional"] | None = Field(
        default=None,
        description='Whether a client must show a certificate ("required"), or may ("optional"): '
        "one that is not accepted is refused either way. Absent: none is asked for.",
    )
    client_ca: File | None = Field(
        default=None,
        description="The certificates, in PEM, of the authorities whose clients are let in. Each "
        "of them is trusted. Not needed where client_allow has only keys (spki).",
    )
    client_crl: File | None = Field(
        default=None,
        description="The authorities' lists of revoked certificates, in PEM, one for each of "
        "them. A list that has expired refuses every client of its authority. Absent: nothing is "
        "looked up.",
    )
    client_allow: ClientAllow | None = Field(
        default=None,
        description="Who is let in of those: "
        '{ dns = ["*.example.org"], uri = ["spiffe://example.org/**"], cn = ["alice"], '
        'spki = ["sha256:..."] }, of which any one match suffices, or "all". dns: a name, or one '
        "label in the star's place. uri: * is one segment of the path, ** all that follow. spki: "
        "SHA-256 of the public key; where there is nothing else and no client_ca, whoever has the "
        "key is let in, whatever the certificate says.",
    )

    @property
    def client_files(self) -> ClientFiles | None:
        return None if self.client_ca is None else ClientFiles(self.client_ca, self.client_crl)
