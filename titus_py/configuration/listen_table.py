"""The table [[listen]]: keys, defaults and descriptions; and whether they fit one another.

Run by the supervisor and the command-line tools. ``docs/reference.py`` writes the reference from
this file, by way of ``tables``.
"""

import ipaddress
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from titus_py.configuration.address import Bindable, UnixAddress
from titus_py.configuration.socket_access import (
    SocketGroup,
    SocketMode,
    SocketUser,
    without_effect,
)
from titus_py.configuration.table import Table
from titus_py.configuration.values import ANY_ON_UNIX, Balancers, Boolean, Duration, ListenAddress

__all__ = ["Listen", "misfits"]


class Listen(Table):
    """[[listen]]: an address to accept connections on."""

    address: ListenAddress = Field(
        description="A numeric address and a port: 192.0.2.5:443, [2001:db8::5]:443, or "
        "every address of both families as [::]:443 or :443. Or a unix socket, such as "
        "unix:/run/titus-py/https.sock, for a load balancer on this machine."
    )
    socket_mode: SocketMode = None
    socket_user: SocketUser = None
    socket_group: SocketGroup = None
    transparent: Boolean = Field(
        default=False,
        description="Also accept connections to other machines' addresses that the firewall sends "
        "here (TPROXY). The local address and port of such a connection are the ones that its "
        "client connected to. It takes CAP_NET_RAW and some rules: titus-py check prints them.",
    )
    accept_proxy_from: Balancers | None = Field(
        default=None,
        description="The load balancers that connect here, as addresses or networks: "
        '["10.0.0.0/8"], or ["unix"] for whoever may connect to a unix socket. Each connection has '
        "to begin with a PROXY header (version 1 or 2), which names the client for the limits, the "
        "log and send_proxy. Nobody else may connect. Absent: clients connect themselves.",
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


def misfits(listen: Listen) -> Iterator[tuple[str, str]]:
    """Settings of a valid table that do not fit one another, and why."""
    address = listen.address
    if isinstance(address, UnixAddress):
        if listen.transparent:
            yield "transparent", f"has no effect on {address}: only this machine can connect"
        if listen.starttls is not None:
            yield "starttls", f"has no effect on {address}: there, these clients ask for no TLS"
    else:
        yield from without_effect(listen, address)
    if listen.accept_proxy_from is not None:
        for reason in _absent_balancers(address, listen.accept_proxy_from):
            yield "accept_proxy_from", reason


def _absent_balancers(address: Bindable, balancers: tuple[str, ...]) -> Iterator[str]:
    """Load balancers that cannot connect, where that leaves nobody or is a slip."""
    if isinstance(address, UnixAddress):
        if balancers != (ANY_ON_UNIX,):
            yield f'expected ["{ANY_ON_UNIX}"]: who connects to {address} has no address'
    elif ANY_ON_UNIX in balancers:
        yield f'"{ANY_ON_UNIX}" is for a unix socket, and {address} is none'
    elif address.host != "::":
        own = 6 if ":" in address.host else 4
        if all(ipaddress.ip_network(one).version != own for one in balancers):
            yield f"lets nobody connect: no IPv{10 - own} connection comes to {address}"
