"""What a parent is to do: the configuration, boiled down by the supervisor.

The supervisor writes it: JSON in a sealed file. The parent and its fork server read it once.
It holds what they cannot, or must not, find out for themselves: certificates and key
references as text, resolved addresses, the descriptors of open listening sockets.
"""

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from titus_py.between.virtual_host import TlsSettings

if TYPE_CHECKING:
    from titus_py.between.client_identity import ClientTerms
    from titus_py.between.tunnel_terms import TunnelTerms

__all__ = [
    "Certificate",
    "Check",
    "Health",
    "Limits",
    "Listener",
    "Plan",
    "ResolvedAddress",
    "SocketAddress",
    "State",
    "VirtualHost",
    "address_text",
    "resolved",
]

SocketAddress = tuple[str, int] | tuple[str, int, int, int] | str
#: An address family, and an address of it as connect(2) takes it.
ResolvedAddress = tuple[int, SocketAddress]


class Limits(NamedTuple):
    """As configured; None is no limit. Times are in seconds."""

    connections_per_address: int | None
    connections_per_prefix: int | None
    connections_per_second: float | None
    handshakes: int
    idle_timeout: float | None
    half_closed_timeout: float
    #: 0 is none.
    keepalive: float
    lifetime: float | None
    #: Connections that were signed for and never asked for their backend.
    unfinished_per_prefix: int
    unfinished_every: float


class Health(NamedTuple):
    """How a backend is checked, as configured. Times are in seconds."""

    every: float
    timeout: float
    fall: int
    rise: int
    send: str | None
    expect: str | None


class Check(NamedTuple):
    """A backend that is checked; ``send_proxy`` says which PROXY header it expects, if any."""

    backend: str
    health: Health
    send_proxy: str | None


class State(NamedTuple):
    """What checks have found of a backend, since when (Unix time), and why it is not up."""

    up: bool
    since: float
    reason: str


class Certificate(NamedTuple):
    """What a host shows, PEM; ``key`` is the SHA-256 of the public key, in hexadecimal."""

    chain: str
    key_reference: str
    key: str


class Listener(NamedTuple):
    """One listening socket; its load balancers' networks, if it takes nobody else's connections.

    ``proxy_timeout``: how long a load balancer may take for its header.
    """

    descriptor: int
    accept_proxy_from: tuple[str, ...]
    proxy_timeout: float
    #: Which tunnel its clients are for; None: they speak TLS, and a virtual host is chosen.
    tunnel: int | None = None
    #: Whether its clients first ask for TLS, as PostgreSQL's do.
    starttls: bool = False
    #: Whether it is a unix socket, whose clients have no address.
    unix: bool = False


class VirtualHost(NamedTuple):
    """One [[vhost]]; its certificates are each for another kind of key.

    ``certificate_index`` is the descriptor of one for a host that has a directory of them
    instead, and their names; or None.
    """

    server_names: tuple[str, ...] | None
    local_address: str | None
    local_port: int | None
    certificates: tuple[Certificate, ...]
    certificate_index: int | None
    #: Where its connections go, but for those of the protocols that ``backends`` has.
    backend: tuple[str, ...]
    backends: dict[str, tuple[str, ...]]
    #: In which order they are tried: "round-robin", "priority", "least-connections", "source".
    balance: str
    #: How its backends are checked; None if they are not.
    health: Health | None
    tls: TlsSettings
    truncated: str
    #: Which PROXY header the backend gets: "v1", "v2", "v2-tls", "v2-tls-cert", or None.
    send_proxy: str | None
    #: "client": the backend sees the client's address. None: this machine's.
    source_address: str | None
    #: What it asks of client certificates; None: it asks for none.
    clients: "ClientTerms | None" = None

    @property
    def passes_tls_facts(self) -> bool:
        """Whether the backend is told what a worker says of its client's TLS."""
        return self.send_proxy in ("v2-tls", "v2-tls-cert")

    @property
    def passes_certificate(self) -> bool:
        """Whether the backend is told which certificate its client has shown."""
        return self.send_proxy == "v2-tls-cert"

    def check(self, backend: str) -> Check | None:
        """How one of its backends is checked, if it is."""
        return self.health and Check(backend, self.health, self.send_proxy)

    def backend_for(self, protocol: str | None, known: int | None) -> tuple[str, ...]:
        """``protocol`` is what was negotiated (ALPN); ``known``, which known client's it is."""
        if known is not None and self.clients is not None:
            own = self.clients.known[known].backend
            if own:
                return own
        return self.backends.get(protocol, self.backend) if protocol else self.backend

    def name_of(self, known: int | None) -> str | None:
        """What a known client is called."""
        if known is None or self.clients is None:
            return None
        return self.clients.known[known].name

    @property
    def all_backends(self) -> set[tuple[str, ...]]:
        """What ``backend_for`` may come to."""
        known = self.clients.known if self.clients is not None else ()
        own = {client.backend for client in known if client.backend}
        return {self.backend, *self.backends.values()} | own


class Plan(NamedTuple):
    """All that a parent and its fork server need to know. Times are in seconds."""

    listeners: tuple[Listener, ...]
    vhosts: tuple[VirtualHost, ...]
    tunnels: "tuple[TunnelTerms, ...]"
    #: The addresses of each backend that a virtual host or a tunnel names, by that name.
    addresses: dict[str, tuple[ResolvedAddress, ...]]
    #: The backends that are checked, and what is known of each of them.
    checks: tuple[Check, ...]
    states: tuple[State | None, ...]
    first_uid: int
    last_uid: int
    max_workers: int
    spare_workers: int
    handshake_timeout: float
    connect_timeout: float
    limits: Limits
    chroot: str
    #: Kernel features that the parent must not serve without.
    required: tuple[str, ...]
    #: The program of the workers' filter, as BPF in hexadecimal.
    worker_filter: str
    #: What the parent becomes once it has started the fork server, and its own filter.
    parent_uid: int
    parent_filter: str
    #: The groups by which it reaches backends' unix sockets; None: by a capability.
    backend_groups: tuple[int, ...] | None = None

    @property
    def indexes(self) -> list[int]:
        """The descriptors of the virtual hosts' indexes."""
        return [
            vhost.certificate_index for vhost in self.vhosts if vhost.certificate_index is not None
        ]

    @property
    def connects_to_unix_sockets(self) -> bool:
        return any(backend.startswith("unix:") for backend in self.addresses)

    @property
    def has_unix_clients(self) -> bool:
        return any(listener.unix for listener in self.listeners)

    @property
    def binds_clients_addresses(self) -> bool:
        return any(vhost.source_address for vhost in self.vhosts)

    def encode(self) -> bytes:
        vhosts = [vhost._asdict() for vhost in self.vhosts]
        # Many virtual hosts may have the same lists of revoked certificates, and long ones.
        texts: dict[str, int] = {}
        for vhost in vhosts:
            if (clients := vhost["clients"]) is not None:
                vhost["clients"] = clients.with_texts(lambda t: texts.setdefault(t, len(texts)))
        tunnels = [
            tunnel.with_texts(lambda t: texts.setdefault(t, len(texts))) for tunnel in self.tunnels
        ]
        fields = {"vhosts": vhosts, "tunnels": tunnels, "texts": list(texts)}
        return json.dumps(self._asdict() | fields).encode()

    @classmethod
    def decode(cls, octets: bytes) -> "Plan":
        fields = json.loads(octets)
        texts = fields.pop("texts")
        fields["limits"] = Limits(*fields["limits"])
        fields["listeners"] = tuple(Listener(*listener) for listener in fields["listeners"])
        fields["vhosts"] = tuple(
            VirtualHost(
                **vhost
                | {
                    "backend": tuple(vhost["backend"]),
                    "health": vhost["health"] and Health(*vhost["health"]),
                    "backends": {name: tuple(some) for name, some in vhost["backends"].items()},
                    "certificates": tuple(Certificate(*one) for one in vhost["certificates"]),
                    "tls": TlsSettings.decode(vhost["tls"]),
                    "clients": _client_terms(vhost["clients"], texts),
                }
            )
            for vhost in fields["vhosts"]
        )
        fields["tunnels"] = tuple(_tunnel_terms(tunnel, texts) for tunnel in fields["tunnels"])
        fields["checks"] = tuple(
            Check(backend, Health(*health), send_proxy)
            for backend, health, send_proxy in fields["checks"]
        )
        fields["states"] = tuple(state and State(*state) for state in fields["states"])
        fields["addresses"] = {
            backend: resolved(addresses) for backend, addresses in fields["addresses"].items()
        }
        groups = fields["backend_groups"]
        fields["backend_groups"] = groups if groups is None else tuple(groups)
        return cls(**fields)


def _client_terms(fields: list[Any] | None, texts: list[str]) -> "ClientTerms | None":
    if fields is None:
        return None
    # Others do not need it in their memory.
    from titus_py.between.client_identity import ClientTerms

    return ClientTerms.decode(fields).with_texts(texts.__getitem__)


def _tunnel_terms(fields: list[Any], texts: list[str]) -> "TunnelTerms":
    # Others do not need it in their memory.
    from titus_py.between.tunnel_terms import TunnelTerms

    return TunnelTerms.decode(fields).with_texts(texts.__getitem__)


def resolved(addresses: list[list[object]]) -> tuple[ResolvedAddress, ...]:
    """Addresses as connect(2) takes them (tuples), from JSON (lists)."""
    return tuple(
        (family, tuple(address) if isinstance(address, list) else address)  # type: ignore[misc]
        for family, address in addresses
    )


def address_text(address: SocketAddress) -> str:
    """An address that connect(2) takes, in the form that people read."""
    if isinstance(address, str):
        return f"unix:{address}"
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"
