"""The key of [keyd] that is about keys that other hosts have: its default and description.

``docs/reference.py`` writes the reference from this file, by way of ``tables``.
"""

from typing import Annotated

from pydantic import Field, PlainSerializer, PlainValidator

from titus_py.configuration.address import UnixAddress, unix_address
from titus_py.configuration.mistake import described, text_of
from titus_py.configuration.table import Table
from titus_py.configuration.values import UpstreamUser

__all__ = ["MOST_UPSTREAMS", "Upstreams"]

#: keyd asks one after the other, within one handshake's time.
MOST_UPSTREAMS = 8
_FORM = "unix:/run/titus-py/keys.sock"


def _upstreams(value: object) -> tuple[UnixAddress, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(  # noqa: TRY004 -- pydantic makes a mistake of a ValueError alone
            f'expected a list of unix sockets, such as ["{_FORM}"], not {described(value)}'
        )
    if not 1 <= len(value) <= MOST_UPSTREAMS:
        raise ValueError(f"expected 1 to {MOST_UPSTREAMS} unix sockets, not {len(value)}")
    found: dict[UnixAddress, None] = {}
    for one in map(text_of, value):
        if not one.startswith("unix:"):
            raise ValueError(
                f"{described(one)} is no unix socket, and keyd uses no network: expected {_FORM}, "
                "where a [[tunnel]] to the other host listens"
            )
        address = unix_address(one.removeprefix("unix:"))
        if not address.path.startswith("/"):
            raise ValueError(f"{described(one)}: expected an absolute path, such as {_FORM}")
        if address in found:
            raise ValueError(f"{described(one)} is there twice")
        found[address] = None
    return tuple(found)


def _as_written(upstreams: tuple[UnixAddress, ...] | None) -> list[str] | None:
    return None if upstreams is None else list(map(str, upstreams))


class Upstreams(Table):
    """The part of [keyd] that is for keys that other hosts have."""

    upstream: (
        Annotated[tuple[UnixAddress, ...], PlainValidator(_upstreams), PlainSerializer(_as_written)]
        | None
    ) = Field(
        default=None,
        description="The unix sockets that lead to keyds of other hosts, which have the keys of "
        f'virtual hosts with key = "upstream": ["{_FORM}"], as a rule where a [[tunnel]] listens. '
        "The first is asked first; the next one where it is gone, slow, or does not have the key. "
        "Absent: none.",
    )
    upstream_user: UpstreamUser | None = Field(
        default=None,
        description="The user that connects to them, in a process of its own: it and its groups "
        "are who the sockets have to let in (tunnel.socket_user). Not keyd's, not the tokens', and "
        "none of the workers' uids.",
    )
