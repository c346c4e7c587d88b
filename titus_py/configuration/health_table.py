"""The table [vhost.health]. Run by the supervisor and the command-line tools."""

from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from titus_py.between import plan
from titus_py.configuration.table import Table
from titus_py.configuration.values import CheckText, Duration, Integer

__all__ = ["Health"]


def _not_too_often(seconds: float) -> float:
    if seconds < 0.1:
        raise ValueError("expected a duration from 100ms to 24h")
    return seconds


class Health(Table):
    """[vhost.health]: checks whether the backends of the virtual host answer."""

    every: Annotated[Duration, AfterValidator(_not_too_often)] = Field(
        default=10.0, description="How often each backend is checked, from 100ms."
    )
    timeout: Duration = Field(
        default=2.0, description="How long a check may take: if it takes longer, it has failed."
    )
    fall: Annotated[Integer, Field(ge=1, le=100)] = Field(
        default=3,
        description="After how many failed checks in a row a backend is down, and gets no more "
        "connections.",
    )
    rise: Annotated[Integer, Field(ge=1, le=100)] = Field(
        default=2,
        description="After how many successful checks in a row a backend that was down is used "
        "again.",
    )
    send: CheckText | None = Field(
        default=None,
        description="What a check sends to the backend once it has connected, such as "
        '"PING\\r\\n": 1,024 octets at most. Absent: nothing.',
    )
    expect: CheckText | None = Field(
        default=None,
        description="What the backend's answer has to begin with: 1,024 octets at most. Absent: a "
        "check succeeds if it can connect.",
        validate_default=True,
    )

    @field_validator("expect")
    @classmethod
    def _after_what_is_sent(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("send"):
            raise ValueError("is missing: without it, what the backend says to send is not read")
        return value

    @property
    def plan(self) -> plan.Health:
        return plan.Health(*(getattr(self, field) for field in plan.Health._fields))
