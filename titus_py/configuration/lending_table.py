"""The keys of [keyd] that are about lending keys to other hosts: defaults and descriptions.

``docs/reference.py`` writes the reference from this file, by way of ``tables``.
"""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    field_validator,
)

from keyd.protocol import Power
from keyd.token.uri import parse
from titus_py.between.known_client import Rate
from titus_py.configuration.address import UnixAddress, unix_address
from titus_py.configuration.known_client_table import ClientName, ClientRate
from titus_py.configuration.mistake import described, text_of
from titus_py.configuration.paths import File, KeyPlace, TokenUri, Upstream, directory_of
from titus_py.configuration.table import Table

__all__ = ["Borrower", "Lending", "LentKey"]

_Operation = Literal["sign_tls13", "sign_tls12_marked", "sign_tls12", "sign_tls12_x448"]
_FORM = "unix:/run/titus-py/lend.sock"


class LentKey(NamedTuple):
    """A key that is lent: in a file, or in a token."""

    key: Path | None
    passphrase_file: Path | None
    token: str | None = None

    @property
    def secrets(self) -> list[Path]:
        """The files that nobody else is to read."""
        pin = parse(self.token).pin_file if self.token else None
        return [path for path in (self.key, self.passphrase_file, pin and Path(pin)) if path]


def _socket(value: object, info: ValidationInfo) -> UnixAddress:
    text = text_of(value)
    if not text.startswith("unix:"):
        raise ValueError(
            f"{described(value)} is no unix socket, and keyd uses no network: expected one such as "
            f"{_FORM}"
        )
    return unix_address(str(directory_of(info) / text.removeprefix("unix:")))


def _some(value: tuple[object, ...]) -> tuple[object, ...]:
    if not value:
        raise ValueError("an empty list lends nothing: name one at least")
    return value


def _of_this_host(value: tuple[object, ...]) -> tuple[object, ...]:
    if any(isinstance(key, Upstream) for key in value):
        raise ValueError("only keys of this host are lent, and no other host's (upstream)")
    return _some(value)


class Borrower(Table):
    """[[keyd.client]]: another host, and what its keyd may have done with keys of this one."""

    name: ClientName = Field(
        description="The name of the [[vhost.client]] that it is, in the virtual host whose "
        "backend is keyd.lend: proxy-a."
    )
    keys: Annotated[tuple[KeyPlace, ...], AfterValidator(_of_this_host)] = Field(
        description="The keys that it may use: files in PEM, which only keyd reads, or URIs of "
        "keys in tokens."
    )
    passphrase_file: File | None = Field(
        default=None,
        description="A file whose first line is the passphrase of these keys, if they are "
        "encrypted.",
    )
    operations: Annotated[tuple[_Operation, ...], AfterValidator(_some)] = Field(
        default=("sign_tls13", "sign_tls12_marked"),
        description='What it may have done with them: "sign_tls13"; "sign_tls12_marked", for '
        "virtual hosts that speak TLS 1.3 as well (RFC 8446, 4.1.3); "
        '"sign_tls12", for those that speak TLS 1.2 alone; "sign_tls12_x448", for those with that '
        "group besides.",
    )
    rate: ClientRate = Field(
        default=Rate(1000, 1),
        description='How many operations it may have: "200/s", "600/m" or "10000/h", and as many '
        "at once. Those beyond are refused.",
    )

    @property
    def lent(self) -> list[LentKey]:
        """In the order of ``keys``."""
        return [
            LentKey(None, None, str(key))
            if isinstance(key, TokenUri)
            else LentKey(Path(key), self.passphrase_file)
            for key in self.keys
        ]

    @property
    def powers(self) -> frozenset[Power]:
        return frozenset(Power[operation.upper()] for operation in self.operations)


class Lending(Table):
    """The part of [keyd] that is for lending keys to other hosts."""

    lend: Annotated[UnixAddress, PlainValidator(_socket), PlainSerializer(str)] | None = Field(
        default=None,
        description="A unix socket where keyd signs for other hosts, those of [[keyd.client]], "
        f'with keys of this one: "{_FORM}". It is the backend of a [[vhost]] that knows these '
        "hosts by their keys. Absent: for nobody.",
    )
    client: tuple[Borrower, ...] = Field(
        default=(),
        description="The hosts that keys are lent to: tables headed [[keyd.client]].",
    )

    @field_validator("client")
    @classmethod
    def _each_of_its_own(cls, value: tuple[Borrower, ...]) -> tuple[Borrower, ...]:
        names = [client.name for client in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"there are two clients of the name {name}")
        return value
