"""The table [limits]. Run by the supervisor and the command-line tools."""

from typing import Annotated

from pydantic import Field

from titus_py.configuration.table import Table
from titus_py.configuration.values import Duration, Integer, Keepalive

__all__ = ["Limits", "Unfinished", "default_handshakes", "default_per_prefix"]

_FEW_HANDSHAKES = 64
_FEW_OF_A_PREFIX = 16


class Unfinished(Table):
    """[limits.unfinished]: handshakes that end after keyd has signed for them."""

    per_prefix: Annotated[Integer, Field(ge=1)] = Field(
        default=500,
        description="How many connections of one IPv6 /64, or IPv4 /24, may be signed for by keyd "
        "and never ask for their backend. With so many, its new connections are reset. Clients "
        "that dislike the certificate are among them, and attackers who have keyd sign through "
        "workers that they took over.",
    )
    every: Duration = Field(
        default=600.0, description="After how long a prefix may have as many again."
    )


class Limits(Table):
    """[limits]: how much of the proxy a client may have. Each limit that was hit is counted."""

    connections_per_address: Annotated[Integer, Field(ge=1)] | None = Field(
        default=None,
        description="How many connections one client address may have. Absent: as many as its "
        "prefix.",
    )
    connections_per_prefix: Annotated[Integer, Field(ge=1)] | None = Field(
        default=None,
        description="How many connections one IPv6 /64, or IPv4 /24, may have. Absent: a quarter "
        "of worker.max, but at least 16. As many as worker.max is no limit.",
    )
    connections_per_second: Annotated[Integer, Field(ge=1, le=1_000_000)] | None = Field(
        default=None,
        description="How many new connections are taken in a second; the others are reset. "
        "Absent: any.",
    )
    handshakes: Annotated[Integer, Field(ge=1)] | None = Field(
        default=None,
        description="How many connections may wait for a worker or be within their handshake at "
        "once. With one more, who has waited longest is reset; and with so many within their "
        "handshake, a newcomer's worker takes the place of the slowest one. As many as "
        "worker.spare may wait in any case. Absent: half of worker.max, but at least 64.",
    )
    idle_timeout: Duration | None = Field(
        default=3600.0,
        description="How long a connection may stand still, in both directions.",
    )
    half_closed_timeout: Duration = Field(
        default=60.0,
        description="How long the other direction may stand still of a connection of which one "
        "has ended; and how long a peer may take nothing of the last octets that are for it. Those "
        "that only the system still holds, it has to take within 16 times as long.",
    )
    keepalive: Keepalive = Field(
        default=60.0,
        description="After how long a silence a peer, client or backend, is asked whether it is "
        "still there (TCP keepalive). A connection whose peer has vanished ends after twice as "
        "long, or, while octets are on their way to it, when the system gives up (tcp_retries2). "
        '"off": it is not asked.',
    )
    lifetime: Duration | None = Field(
        default=None, description="How long a connection may last altogether. Absent: as it likes."
    )
    unfinished: Unfinished = Field(
        default_factory=Unfinished,
        description="How many connections keyd may sign for that never ask for their backend.",
    )


def default_handshakes(connections: int) -> int:
    """How many of these connections may be in their handshake: half, but at least 64 (or all)."""
    return max(min(connections, _FEW_HANDSHAKES), connections // 2)


def default_per_prefix(connections: int) -> int:
    """How many of these connections one network may have: a quarter, but at least 16."""
    return max(_FEW_OF_A_PREFIX, connections // 4)
