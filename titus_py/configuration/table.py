"""What every table of the configuration has in common."""

from pydantic import BaseModel, ConfigDict

__all__ = ["Table"]


class Table(BaseModel):
    # What checks the values is made once, for the whole configuration, when one is first read. By
    # default pydantic makes it of each table first, and then anew of each table with that within.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
