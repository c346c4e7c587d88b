"""The table [[vhost]]: keys, defaults and descriptions.

Run by the supervisor and the command-line tools. ``docs/reference.py`` writes the reference from
this file, by way of ``tables``.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from titus_py.between.virtual_host import TlsSettings, applies_to
from titus_py.configuration.address import Address, Bindable, UnixAddress
from titus_py.configuration.certificate_table import Credentials
from titus_py.configuration.client_table import ClientCertificates
from titus_py.configuration.health_table import Health
from titus_py.configuration.known_client_table import KnownClients
from titus_py.configuration.mistake import described
from titus_py.configuration.table import Table
from titus_py.configuration.toml import key_text
from titus_py.configuration.values import (
    BackendAddresses,
    BackendsByProtocol,
    Boolean,
    CipherList,
    Ciphersuites,
    Groups,
    Integer,
    LocalAddress,
    Protocols,
    ServerNames,
    Version,
)

__all__ = ["Backend", "Match", "VirtualHost"]


class Match(Table):
    """The part of [[vhost]] that says which connections it takes."""

    sni: ServerNames | None = Field(
        default=None,
        description='The server names that it takes: "www.example.org", "*.example.org" (one '
        'label in the star\'s place), "" (no name sent). Absent: any, and none.',
    )
    local_address: LocalAddress | None = Field(
        default=None, description="The local IP address that it takes connections to. Absent: any."
    )
    local_port: Annotated[Integer, Field(ge=1, le=65535)] | None = Field(
        default=None, description="The local port that it takes connections to. Absent: any."
    )

    def receives(self, endpoint: Bindable) -> bool:
        """Whether connections to this local address and port can be for this virtual host.

        A unix socket has neither.
        """
        if isinstance(endpoint, UnixAddress):
            return self.by_name_alone
        return applies_to(self.local_address, self.local_port, endpoint.host, endpoint.port)

    @property
    def by_name_alone(self) -> bool:
        """Whether the name that a client asks for is all that tells it from others."""
        return self.local_address is None and self.local_port is None


class Backend(KnownClients):
    """The part of [[vhost]] that says where connections go, by their protocol."""

    backend: BackendAddresses = Field(
        description="Where the plaintext goes: 127.0.0.1:8080, [::1]:8080, name:8080 or "
        "unix:/run/app.sock, which sees a uid out of worker.uids connect (SO_PEERCRED), another "
        "one after each reload. Of a name, all addresses are tried, IPv6 and IPv4 in turn: the "
        "next one where one fails, or has not answered within 250 ms. Several backends are a list: "
        '["10.0.0.5:8080", "10.0.0.6:8080"].'
    )
    balance: Literal["round-robin", "priority", "least-connections", "source"] = Field(
        default="round-robin",
        description="Which of several backends a connection goes to: each in turn "
        '("round-robin"), always the first of the list ("priority"), the one with the fewest '
        'connections ("least-connections"), or the same one for the same client address '
        '("source"). Where connecting to it fails, the next one is tried, and it is tried last for '
        "ten seconds.",
    )
    health: Health | None = Field(
        default=None,
        description="Checks of the backends, a table of its own. Absent: none are made.",
    )
    send_proxy: Literal["v1", "v2", "v2-tls", "v2-tls-cert"] | None = Field(
        default=None,
        description="The PROXY header that the backend gets before anything else, and must expect: "
        'its client\'s address and the one it came to, as a line of text ("v1") or in binary '
        '("v2"); with "v2-tls" also the server name, the protocol, the TLS version and the suite; '
        'with "v2-tls-cert" the client\'s certificate, its common name and the name of its '
        "[[vhost.client]] as well. "
        "Absent: none, and the backend sees titus-py's address as its client's.",
    )
    source_address: Literal["client"] | None = Field(
        default=None,
        description='From which address the backend is connected to: with "client", from the '
        "client's own, so that the backend sees it. The backend must be on another machine, whose "
        "answers come back through this one. It takes CAP_NET_RAW and some rules: titus-py check "
        "prints them. Absent: from an address of this machine.",
    )
    alpn: Protocols | None = Field(
        default=None,
        description="The application protocols that clients may negotiate (ALPN), best first, "
        'such as ["h2", "http/1.1"]. A client that offers others only is refused; one that offers '
        "none is served. Absent: what clients offer is ignored.",
    )
    alpn_required: Boolean = Field(
        default=False, description="Also refuse clients that negotiate no protocol."
    )
    backends: Annotated[dict[str, BackendAddresses], AfterValidator(BackendsByProtocol)] = Field(
        default_factory=BackendsByProtocol,
        description="Where the plaintext of a protocol in alpn goes, where that is not backend: a "
        'table [vhost.backends] with lines such as h2 = "127.0.0.1:8081". Each may be a list, too.',
    )

    @field_validator("alpn_required")
    @classmethod
    def _only_with_alpn(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("alpn", ()) is None:
            raise ValueError("has no effect without alpn: say there which protocols there are")
        return value

    @field_validator("backends")
    @classmethod
    def _only_of_protocols(
        cls, value: dict[str, tuple[Address, ...]], info: ValidationInfo
    ) -> dict[str, tuple[Address, ...]]:
        others = sorted(value.keys() - (info.data["alpn"] or ())) if "alpn" in info.data else []
        for name in others:
            reason = f"{described(name)} is none of this host's protocols: add it to alpn"
            if name in VirtualHost.model_fields:
                reason = f"{name} is a setting of [[vhost]]: put it above [vhost.backends]"
            raise ValueError(reason)
        return value

    @property
    def all_backends(self) -> list[tuple[str, Address]]:
        """Everywhere that connections go, each with the setting that says so."""
        settings = {"backend": self.backend} | {
            f"backends.{key_text(protocol)}": some for protocol, some in self.backends.items()
        }
        settings |= {
            f"client[{i}].backend": client.backend
            for i, client in enumerate(self.client)
            if client.backend is not None
        }
        return [(setting, backend) for setting, some in settings.items() for backend in some]


class VirtualHost(ClientCertificates, Backend, Credentials, Match):
    """[[vhost]]: the host that a connection is for. The first that matches is taken."""

    min_version: Version = Field(
        default="TLSv1.2", description="The lowest TLS version that is accepted."
    )
    max_version: Version = Field(
        default="TLSv1.3", description="The highest TLS version that is offered."
    )
    ciphers: CipherList | None = Field(
        default=None,
        description="The TLS 1.2 suites, best first, as an OpenSSL cipher list. Offered are those "
        "of ECDHE (and of the RSA key exchange where that is turned on, after them): the check "
        "names what else the list asks for. Absent: those with authenticated encryption.",
    )
    ciphersuites: Ciphersuites | None = Field(
        default=None,
        description="The TLS 1.3 suites, best first, colons between. Absent: OpenSSL's default.",
    )
    groups: Groups | None = Field(
        default=None,
        description="The groups for the key exchange, best first, such as "
        '["X25519MLKEM768", "X25519", "P-256"]. A client that guessed another than the best one '
        "keeps to its guess, but not where the best one is post-quantum and its guess is not. "
        "Absent: X25519MLKEM768, SecP256r1MLKEM768, X25519, P-256, P-384, P-521.",
    )
    rsa_key_exchange: Boolean = Field(
        default=False,
        description="Also accept TLS 1.2's RSA key exchange, which is not forward-secret: "
        "for clients that know nothing better. An attacker who takes workers over can decrypt one "
        "recorded session of the same key with each, whoever's it was. So no other virtual host "
        "may have that key.",
    )

    truncated: Literal["reset", "end"] = Field(
        default="reset",
        description="What the backend sees where a client ends its stream without TLS's own "
        'ending (close_notify), as browsers do and as an attacker on the way could: "reset", or '
        '"end", as if it had been a clean one, for backends that take a reset amiss.',
    )

    @field_validator("max_version")
    @classmethod
    def _not_below_min_version(cls, value: str, info: ValidationInfo) -> str:
        if value < info.data.get("min_version", value):
            raise ValueError(f"{value} is below min_version, {info.data['min_version']}")
        return value

    @field_validator("rsa_key_exchange")
    @classmethod
    def _only_with_tls12(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("min_version") == "TLSv1.3":
            raise ValueError("TLS 1.3 has no RSA key exchange: set min_version to TLSv1.2")
        return value

    @property
    def tls(self) -> TlsSettings:
        return TlsSettings(*(getattr(self, field) for field in TlsSettings._fields))
