"""Who may connect to a unix socket that titus-py makes: its mode, owner and group.

Run by the supervisor and by the commands. The settings of [[listen]] and [[tunnel]] have the names
and the form of systemd.socket(5): SocketMode=, SocketUser=, SocketGroup=.
"""
# ruff: noqa: TRY004 -- pydantic makes a mistake of a ValueError, and lets a TypeError through

import grp
import pwd
import re
from collections.abc import Callable, Iterator
from typing import Annotated, NamedTuple, Protocol

from pydantic import Field, PlainSerializer, PlainValidator

from titus_py.configuration.address import IPAddress
from titus_py.configuration.mistake import described

__all__ = [
    "SocketAccess",
    "SocketGroup",
    "SocketMode",
    "SocketSettings",
    "SocketUser",
    "without_effect",
]

#: Its owner and its group may connect, which are root's unless others are set.
_DEFAULT_MODE, _ROOT = 0o660, 0
_ANY_MAY_WRITE = 0o222
#: The last value of uid_t and gid_t means "leave as it is" to chown(2).
_MOST_ID = 2**32 - 2


class Holder(NamedTuple):
    """A user or a group of the system, or a number that has no name."""

    name: str
    number: int


class SocketSettings(Protocol):
    """A table that has them."""

    @property
    def socket_mode(self) -> int | None: ...
    @property
    def socket_user(self) -> Holder | None: ...
    @property
    def socket_group(self) -> Holder | None: ...


class SocketAccess(NamedTuple):
    """As configured; None is what is not set."""

    set_mode: int | None = None
    set_uid: int | None = None
    set_gid: int | None = None

    @classmethod
    def of(cls, table: SocketSettings) -> "SocketAccess":
        user, group = table.socket_user, table.socket_group
        return cls(table.socket_mode, user and user.number, group and group.number)

    @property
    def is_set(self) -> bool:
        return self != SocketAccess()

    @property
    def mode(self) -> int:
        return _DEFAULT_MODE if self.set_mode is None else self.set_mode

    @property
    def owner(self) -> tuple[int, int]:
        """The uid and the gid."""
        return self.set_uid or _ROOT, self.set_gid or _ROOT


def without_effect(table: SocketSettings, listen: IPAddress) -> Iterator[tuple[str, str]]:
    """Each of the settings that is there, where clients connect by TCP, and why it is a mistake."""
    for field in ("socket_mode", "socket_user", "socket_group"):
        if getattr(table, field) is not None:
            yield field, f"has no effect on {listen}, which is no unix socket"


def _mode(value: object) -> int:
    if not isinstance(value, str) or not re.fullmatch("0?[0-7]{3}", value):
        # A number would be taken for decimal by some, and for octal by others.
        raise ValueError(f'expected a mode such as "0660", in quotes, not {described(value)}')
    mode = int(value, 8)
    if not mode & _ANY_MAY_WRITE:
        raise ValueError(
            f'"{value}" lets only root connect, which takes the right to write: '
            'expected "0600", "0660" or "0666"'
        )
    return mode


def _user(value: object) -> Holder:
    return _holder(value, "user", lambda name: pwd.getpwnam(name).pw_uid)


def _group(value: object) -> Holder:
    return _holder(value, "group", lambda name: grp.getgrnam(name).gr_gid)


def _holder(value: object, kind: str, number_of: Callable[[str], int]) -> Holder:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"expected a {kind}'s name or number, not {described(value)}")
    if isinstance(value, int) or re.fullmatch(r"[0-9]{1,10}", value):
        if not 0 <= int(value) <= _MOST_ID:
            raise ValueError(f"expected a number from 0 to {_MOST_ID}, not {described(value)}")
        return Holder(str(int(value)), int(value))
    try:
        return Holder(value, number_of(value))
    except (KeyError, ValueError):
        raise ValueError(f"no {kind} is named {described(value)}") from None


SocketMode = Annotated[
    Annotated[int, PlainValidator(_mode), PlainSerializer(lambda mode: f"{mode:04o}")] | None,
    Field(
        description="The mode of the unix socket: to connect takes the right to write. "
        'Absent: "0660".'
    ),
]
SocketUser = Annotated[
    Annotated[Holder, PlainValidator(_user), PlainSerializer(lambda one: one.name)] | None,
    Field(description="The unix socket's owner, by name or number. Absent: root."),
]
SocketGroup = Annotated[
    Annotated[Holder, PlainValidator(_group), PlainSerializer(lambda one: one.name)] | None,
    Field(description="The unix socket's group, by name or number. Absent: root's."),
]
