"""The keys of [keyd] that are about keys in tokens: defaults and descriptions.

``docs/reference.py`` writes the reference from this file, by way of ``tables``.
"""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, PlainValidator, ValidationInfo

from titus_py.configuration.mistake import Valid, described, text_of
from titus_py.configuration.paths import FilePath
from titus_py.configuration.table import Table
from titus_py.configuration.values import Boolean, TokenUser

__all__ = ["Tokens"]


def _there(path: Path, info: ValidationInfo) -> Path:
    if not isinstance(info.context, Valid) and not path.exists():
        raise ValueError(f"{path}: does not exist")
    return path


def _variable(value: object) -> str:
    text = text_of(value)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=[^\0]*", text):
        raise ValueError(f'expected a variable such as "NAME=value", not {described(value)}')
    return text


class Tokens(Table):
    """The part of [keyd] that is for keys in tokens."""

    token_user: TokenUser | None = Field(
        default=None,
        description="The user that the processes of tokens run as, where a key is in a token "
        '(key = "pkcs11:…"): its groups are those that the token takes. Not keyd\'s, and none of '
        "the workers' uids.",
    )
    token_paths: tuple[Annotated[FilePath, AfterValidator(_there)], ...] = Field(
        default=(),
        description="Directories and devices that a token's module may read and write, besides "
        "the libraries that it may read.",
    )
    token_environment: tuple[Annotated[str, PlainValidator(_variable)], ...] = Field(
        default=(), description='Variables that a token\'s module reads, each "NAME=value".'
    )
    token_network: Boolean = Field(
        default=False,
        description="Whether a token's module may use the network: for a network HSM, or a "
        "cloud's key service.",
    )
