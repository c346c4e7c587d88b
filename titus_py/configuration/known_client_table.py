"""The tables [[vhost.client]]: defaults and descriptions.

Run by the supervisor and the command-line tools. ``docs/reference.py`` writes the reference from
this file, by way of ``tables``.
"""

import re
from typing import Annotated

from pydantic import Field, PlainSerializer, PlainValidator, ValidationInfo, field_validator

from titus_py.between.client_allow import Allow
from titus_py.between.client_identity import MAX_KNOWN
from titus_py.between.known_client import KnownClient, Rate
from titus_py.configuration.client_allow import CommonNames, DnsNames, PublicKeys, Uris
from titus_py.configuration.mistake import described, text_of
from titus_py.configuration.table import Table
from titus_py.configuration.values import BackendAddresses, Integer

__all__ = ["Client", "ClientName", "ClientRate", "KnownClients"]

_UNITS = {"s": 1, "m": 60, "h": 3600}
_MOST_OF_A_RATE = 1_000_000


def _rate(value: object) -> Rate:
    parts = re.fullmatch(r"([0-9]{1,7})/([smh])", value if isinstance(value, str) else "")
    if parts is None or not 1 <= int(parts[1]) <= _MOST_OF_A_RATE:
        raise ValueError(
            'expected so many a second, a minute or an hour, such as "50/s", "600/m" or "100/h", '
            f"not {described(value)}"
        )
    return Rate(int(parts[1]), _UNITS[parts[2]])


def _rate_text(rate: Rate) -> str:
    return f"{rate.most}/{next(unit for unit in _UNITS if _UNITS[unit] == rate.seconds)}"


def _name(value: object) -> str:
    name = text_of(value)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise ValueError(
            f"{described(value)}: expected letters, digits, dots, hyphens and underscores, 64 of "
            "them at most"
        )
    return name


ClientName = Annotated[str, PlainValidator(_name)]
ClientRate = Annotated[Rate, PlainValidator(_rate), PlainSerializer(_rate_text)]


class Client(Table):
    """[[vhost.client]]: a client that is known, what it may reach, and how much of it."""

    name: ClientName = Field(
        description="What it is called in the log, the metrics and titus-py status: web-1."
    )
    spki: PublicKeys = Field(
        default=(),
        description="Its public keys, as in client_allow: two while it changes from one to the "
        "other. Who has one of them, or one of the names below, is this client.",
    )
    dns: DnsNames = Field(default=(), description="DNS names, as in client_allow.")
    uri: Uris = Field(default=(), description="URIs, as in client_allow.")
    cn: CommonNames = Field(default=(), description="Common names, as in client_allow.")
    backend: BackendAddresses | None = Field(
        default=None,
        description="Where its connections go, whatever its protocol: 10.0.0.5:5432, or a list as "
        "in [[vhost]]. Absent: where the virtual host's go.",
    )
    connections: Annotated[Integer, Field(ge=1)] | None = Field(
        default=None,
        description="How many connections it may have at once; with one more, that one is reset. "
        "After a reload, those that go on do not count. Absent: any number.",
    )
    rate: ClientRate | None = Field(
        default=None,
        description='How many new connections it may have: "50/s", "600/m" or "100/h". Those '
        "beyond are reset. Absent: any number.",
    )

    @property
    def allow(self) -> Allow:
        return Allow(self.dns, self.uri, self.cn, self.spki)

    @property
    def plan(self) -> KnownClient:
        backend = tuple(map(str, self.backend or ()))
        return KnownClient(self.name, self.allow, backend, self.connections, self.rate)


class KnownClients(Table):
    """The part of [[vhost]] that names clients one by one."""

    client: tuple[Client, ...] = Field(
        default=(),
        description="The clients that are let in, instead of client_allow: tables headed "
        "[[vhost.client]]. Who is none of them is refused; who could be several is the first.",
    )

    @field_validator("client")
    @classmethod
    def _each_of_its_own(
        cls, value: tuple[Client, ...], info: ValidationInfo
    ) -> tuple[Client, ...]:
        del info
        if len(value) > MAX_KNOWN:
            raise ValueError(f"more than {MAX_KNOWN} clients: split them among virtual hosts")
        names: set[str] = set()
        keys: dict[str, str] = {}
        for client in value:
            if client.name in names:
                raise ValueError(f"there are two clients of the name {client.name}")
            names.add(client.name)
            if not any(client.allow):
                raise ValueError(
                    f"{client.name} is nobody: say its public keys (spki), or dns, uri or cn"
                )
            for digest in client.spki:
                other = keys.setdefault(digest, client.name)
                if other != client.name:
                    raise ValueError(
                        f"{other} and {client.name} have the same public key, sha256:{digest}"
                    )
        return value
