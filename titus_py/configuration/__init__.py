"""The configuration: reads it, and finds every mistake in it at once.

Only the supervisor (root) and the command-line tools import this: pydantic is too large for the
parent and its workers. The operator's intent is trusted, the operator's typing is not. No key is
opened here: ``check`` asks keyd about it.
"""

from titus_py.configuration.loading import Loaded, from_options, load
from titus_py.configuration.mistake import Mistake, Source, Valid
from titus_py.configuration.tables import (
    Configuration,
    Credential,
    Keyd,
    Listen,
    Log,
    Tunnel,
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
    "Tunnel",
    "User",
    "Valid",
    "VirtualHost",
    "Worker",
    "from_options",
    "load",
]
