"""The table [[listen]]: keys, defaults and descriptions.

Run by the supervisor and the command-line tools. ``docs/reference.py`` writes the reference from
this file, by way of ``tables``.
"""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from titus_py.configuration.table import Table
from titus_py.configuration.values import Boolean, Duration, ListenAddress, Networks

__all__ = ["Listen"]


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
