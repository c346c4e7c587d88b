"""The tables of the configuration: their keys, defaults and descriptions.

``docs/reference.py`` writes the reference from this file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from titus_py.between.virtual_host import TlsSettings, applies_to
from titus_py.configuration.address import Address, Bindable, IPAddress
from titus_py.configuration.backend_groups import BackendGroups
from titus_py.configuration.certificate_table import Certificate, Credential, Credentials
from titus_py.configuration.client_table import ClientCertificates
from titus_py.configuration.health_table import Health
from titus_py.configuration.known_client_table import KnownClients
from titus_py.configuration.lending_table import Lending, LentKey
from titus_py.configuration.limits_table import Limits
from titus_py.configuration.mistake import described
from titus_py.configuration.paths import EmptyDirectory, FilePath
from titus_py.configuration.table import Table
from titus_py.configuration.token_table import Tokens
from titus_py.configuration.toml import key_text
from titus_py.configuration.tunnel_table import Tunnel
from titus_py.configuration.uids import DEFAULT_UIDS
from titus_py.configuration.upstream_table import Upstreams
from titus_py.configuration.values import (
    BackendAddresses,
    BackendsByProtocol,
    Boolean,
    CipherList,
    Ciphersuites,
    Duration,
    Groups,
    Integer,
    KeydUser,
    ListenAddress,
    LocalAddress,
    MetricsAddress,
    Networks,
    Patterns,
    Protocols,
    ServerNames,
    UidRange,
    Version,
    default_keyd_user,
)

__all__ = [
    "TABLES",
    "Backend",
    "Certificate",
    "ClientCertificates",
    "Configuration",
    "Credential",
    "Credentials",
    "Keyd",
    "KeydSocket",
    "Lending",
    "LentKey",
    "Limits",
    "Listen",
    "Log",
    "Match",
    "Metrics",
    "Service",
    "Table",
    "Tunnel",
    "Uids",
    "VirtualHost",
    "Worker",
    "table_of",
]


def _not_too_often(seconds: float) -> float:
    if seconds < 1:
        raise ValueError("expected a duration from 1s to 24h")
    return seconds


class Uids(Table):
    """The part of [worker] that is checked as a whole."""

    max: Integer = Field(
        default=1000, ge=1, le=1_000_000, description="How many connections may live at once."
    )
    spare: Integer = Field(
        default=16,
        ge=1,
        le=10_000,
        description="How many workers wait, confined, for a client to come: at most; others are "
        "made once half of them are taken.",
    )
    uids: UidRange = Field(
        default=DEFAULT_UIDS,
        description="The uids of workers, first to last: one per live connection, never shared; "
        "and one for their parent. At least 2 * (max + spare + 1), so that a reload has room "
        "beside what serves, and better three times that; one more where a backend has a name, "
        "and one where metrics are served. "
        "Nothing else on the system may use them: no user or group, no range in /etc/subuid or "
        "/etc/subgid, no other instance.",
    )


class Worker(Uids):
    """[worker]: the processes that each serve one connection."""

    handshake_timeout: Duration = Field(
        default=10.0,
        description="How long a client may take until its first message is there; and "
        "how long from then to the handshake's end.",
    )
    connect_timeout: Duration = Field(
        default=5.0,
        description="How long connecting may take, all backends and their addresses together.",
    )
    resolve_every: Annotated[Duration, AfterValidator(_not_too_often)] = Field(
        default=30.0,
        description="How often backends' names are looked up again, from 1s. If the name server "
        "does not answer, the last addresses are kept.",
    )
    drain: Duration = Field(
        default=30.0, description="How long connections may go on when titus-py is told to stop."
    )
    require: tuple[Literal["landlock", "speculation"], ...] = Field(
        default=(),
        description="Features that not every kernel has, and without which not to serve: "
        '"landlock", "speculation" (turning indirect-branch and store-bypass speculation off).',
    )
    chroot: EmptyDirectory = Field(
        default=Path("/run/titus-py/empty"),
        validate_default=True,
        description="The empty directory, root's own, that is all a worker sees of the file "
        "system. Made if it does not exist.",
    )
    backend_groups: BackendGroups | None = Field(
        default=None,
        description="The groups, by name or number, by which unix sockets of backends are reached: "
        "a socket that not everybody may connect to has to be one of theirs. The parent is then in "
        "these groups, and has no capability for it. Absent: it reaches every unix socket of the "
        "machine.",
    )

    @property
    def backend_gids(self) -> tuple[int, ...] | None:
        groups = self.backend_groups
        return groups if groups is None else tuple(group.gid for group in groups)


class KeydSocket(Table):
    """The part of [keyd] that the virtual hosts' keys depend on."""

    socket: FilePath | None = Field(
        default=None,
        description="The control socket of a keyd that is a service of its own and has the keys "
        "(keyd control). Absent: titus-py starts a keyd itself, and no [[vhost]] goes without "
        "a key.",
    )


class Keyd(KeydSocket, Upstreams, Tokens, Lending):
    """[keyd]: the process that holds the private keys."""

    user: KeydUser = Field(
        default_factory=default_keyd_user,
        description="The user that keyd runs as, by name or number: one that nothing else "
        "runs as, and none of the workers' uids.",
    )
    lock_memory: Literal["required", "try"] = Field(
        default="required",
        description="Whether keyd's memory has to be locked, so that no key is ever swapped out: "
        'with "try", it goes without where the system refuses, as in a container without '
        "CAP_IPC_LOCK.",
    )


class Log(Table):
    """[log]: what is written to standard error."""

    format: Literal["text", "json"] = Field(
        default="text", description="One line an event, for people (text) or for programs (json)."
    )
    level: Literal["info", "warning", "error", "alarm"] = Field(
        default="info",
        description='The quietest events that are written. "info" has two for each connection. '
        "What is not written is counted all the same.",
    )


class Metrics(Table):
    """[metrics]: numbers for Prometheus."""

    address: MetricsAddress | None = Field(
        default=None,
        description="Where to serve them: 127.0.0.1:9443, or unix:/run/titus-py/metrics.sock. "
        "Absent: nowhere.",
    )


class Service(Table):
    """[service]: how titus-py itself is run."""

    reload_on_change: Boolean = Field(
        default=False,
        description="Reload by itself when a certificate or key file has changed, some seconds "
        "after it last did.",
    )


class Listen(Table):
    """[[listen]]: an address to accept connections on."""

    address: ListenAddress = Field(
        description="A numeric address and a port: 192.0.2.5:443, [2001:db8::5]:443, or "
        "every address of both families as [::]:443 or :443."
    )
    transparent: Boolean = Field(
        default=False,
        description="Also accept connections to other machines' addresses that the firewall sends "
        "here (TPROXY). The local address and port of such a connection are the ones that its "
        "client connected to. It takes CAP_NET_RAW and some rules: titus-py check prints them.",
    )
    accept_proxy_from: Networks | None = Field(
        default=None,
        description="The load balancers that connect here, as addresses or networks: "
        '["10.0.0.0/8"]. Each connection has to begin with a PROXY header (version 1 or 2), which '
        "names the client for the limits, the log and send_proxy. Nobody else may connect. Absent: "
        "clients connect themselves.",
    )
    proxy_timeout: Duration | None = Field(
        default=None,
        description="How long a load balancer may take for its PROXY header; at most as long as "
        'worker.handshake_timeout, of which it is a part. Absent: "5s".',
    )

    starttls: Literal["postgresql"] | None = Field(
        default=None,
        description="The protocol whose clients first ask for TLS, in the clear: with "
        '"postgresql", the request of psql and of PostgreSQL\'s libraries is answered, and the '
        "backend is a PostgreSQL without TLS. Absent: TLS begins at once.",
    )

    @field_validator("starttls")
    @classmethod
    def _not_for_load_balancers(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("accept_proxy_from"):
            raise ValueError("does not go with accept_proxy_from: clients connect themselves")
        return value

    @field_validator("proxy_timeout")
    @classmethod
    def _only_for_load_balancers(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("accept_proxy_from", ()) is None:
            raise ValueError("nobody sends a PROXY header here: accept_proxy_from is missing")
        return value


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

    def receives(self, endpoint: IPAddress) -> bool:
        """Whether connections to this local address and port can be for this virtual host."""
        return applies_to(self.local_address, self.local_port, endpoint.host, endpoint.port)


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


class Configuration(Table):
    """The whole file. Immutable for the life of the processes that are started with it."""

    include: Patterns = Field(
        default=(),
        description='Other files whose tables belong to this one, such as ["conf.d/*.toml"]: each '
        "has [[listen]], [[vhost]] and [[tunnel]] tables and nothing else. The files that match "
        "are read in the order of their names, after this one. Relative paths in them are relative "
        "to the directory of this file.",
    )

    worker: Worker = Field(default_factory=Worker, description="The processes for connections.")
    limits: Limits = Field(
        default_factory=Limits, description="How much of the proxy a client may have."
    )
    keyd: Keyd = Field(default_factory=Keyd, description="The process that holds the keys.")
    log: Log = Field(default_factory=Log, description="What is written to standard error.")
    metrics: Metrics = Field(default_factory=Metrics, description="Numbers for Prometheus.")
    service: Service = Field(default_factory=Service, description="How titus-py itself is run.")
    listen: tuple[Listen, ...] = Field(
        default=(), description="The addresses to accept TLS connections on: one table each."
    )
    vhost: tuple[VirtualHost, ...] = Field(
        default=(), description="The virtual hosts, the first that matches taken: one table each."
    )
    tunnel: tuple[Tunnel, ...] = Field(
        default=(), description="Tunnels to TLS servers, for plaintext clients: one table each."
    )

    @property
    def listening(self) -> list[Bindable]:
        """The addresses that clients connect to."""
        return [*(table.address for table in self.listen), *(one.listen for one in self.tunnel)]

    @property
    def has_transparent_sockets(self) -> bool:
        """Whether it takes TRANSPARENT_CAPABILITIES to serve this."""
        return any(listen.transparent for listen in self.listen) or any(
            vhost.source_address for vhost in self.vhost
        )


def table_of(field: FieldInfo) -> type[Table] | None:
    """The model of a key that is a table, or an array of tables; None for any other key."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Table):
            return kind
    return None


TABLES: Mapping[str, type[Table]] = {
    "worker": Worker,
    "limits": Limits,
    "keyd": Keyd,
    "log": Log,
    "metrics": Metrics,
    "service": Service,
    "listen": Listen,
    "vhost": VirtualHost,
    "tunnel": Tunnel,
}
