"""What every table of the configuration has in common."""

from pydantic import BaseModel, ConfigDict

__all__ = ["Table"]


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
