"""The tables of the configuration: their keys, defaults and descriptions.

``docs/reference.py`` writes the reference from this file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field
from pydantic.fields import FieldInfo

from titus_py.configuration.address import Bindable, IPAddress, UnixAddress
from titus_py.configuration.backend_groups import BackendGroups
from titus_py.configuration.certificate_table import Certificate, Credential, Credentials
from titus_py.configuration.client_table import ClientCertificates
from titus_py.configuration.lending_table import Lending, LentKey
from titus_py.configuration.limits_table import Limits
from titus_py.configuration.listen_table import Listen
from titus_py.configuration.paths import EmptyDirectory, FilePath
from titus_py.configuration.socket_access import SocketAccess
from titus_py.configuration.table import Table
from titus_py.configuration.token_table import Tokens
from titus_py.configuration.tunnel_table import Tunnel
from titus_py.configuration.uids import DEFAULT_UIDS
from titus_py.configuration.upstream_table import Upstreams
from titus_py.configuration.values import (
    Boolean,
    Duration,
    Integer,
    KeydUser,
    ListenAddress,
    Patterns,
    UidRange,
    default_keyd_user,
)
from titus_py.configuration.vhost_table import Backend, Match, VirtualHost

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

    address: ListenAddress | None = Field(
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
    def socket_access(self) -> dict[Bindable, SocketAccess]:
        """Who may connect to each unix socket that clients connect to."""
        listening = [(table.address, SocketAccess.of(table)) for table in self.listen]
        listening += [(tunnel.listen, SocketAccess.of(tunnel)) for tunnel in self.tunnel]
        return {
            address: access for address, access in listening if isinstance(address, UnixAddress)
        }

    @property
    def transparent_addresses(self) -> list[IPAddress]:
        """Where connections to other machines' addresses are accepted, too."""
        return [
            listen.address
            for listen in self.listen
            if listen.transparent and isinstance(listen.address, IPAddress)
        ]

    @property
    def has_transparent_sockets(self) -> bool:
        """Whether it takes TRANSPARENT_CAPABILITIES to serve this."""
        return bool(self.transparent_addresses) or any(vhost.source_address for vhost in self.vhost)


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
