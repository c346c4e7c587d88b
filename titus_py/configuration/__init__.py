"""The configuration: what it may say, and every mistake in it at once.

Imported by the supervisor (root) and the command-line tools alone: pydantic is more
than the parent and its workers should carry. It trusts the operator's intent, not the
operator's typing. It never opens a key: what is inside is for ``check`` to ask keyd.
"""

from titus_py.configuration.loading import Loaded, from_options, load
from titus_py.configuration.mistake import Mistake, Source, Valid, printable
from titus_py.configuration.tables import (
    Configuration,
    Credential,
    Keyd,
    Listen,
    Log,
    VirtualHost,
    Worker,
)
from titus_py.configuration.values import User

__all__ = [
    "Configuration",
    "Credential",
    "Keyd",
    "Listen",
    "Loaded",
    "Log",
    "Mistake",
    "Source",
    "User",
    "Valid",
    "VirtualHost",
    "Worker",
    "from_options",
    "load",
    "printable",
]
