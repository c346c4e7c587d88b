"""Telling the supervisor of an audit, so that what keyd refuses to it rings no alarm.

Run by ``titus-py audit``, as root. The supervisor is trusted with a number, and with no more.
"""

from pathlib import Path

from titus_py.audit.instance import status
from titus_py.supervisor.announced_audits import FIRST_CONNECTION, LAST_CONNECTION
from titus_py.supervisor.control import CONTROL_DIRECTORY
from titus_py.supervisor.control_client import NoAnswer, ask

__all__ = ["UNANNOUNCED", "announce"]

#: What an audit is refused under that could not announce itself: no connection has it either.
UNANNOUNCED = 0
_SECONDS = 5.0


def announce(supervisor: int) -> int:
    """The number of a connection to be refused under; UNANNOUNCED where nobody gives one."""
    try:
        # The socket has the process id that the supervisor has to itself, and may be in a file
        # system that only the supervisor sees.
        pid = int(status(supervisor)["NSpid"].split()[-1])
        directory = Path(f"/proc/{supervisor}/root{CONTROL_DIRECTORY}")
        connection = ask(pid, {"do": "audit"}, _SECONDS, directory).get("connection")
    except (NoAnswer, FileNotFoundError, ProcessLookupError):
        return UNANNOUNCED
    if isinstance(connection, int) and FIRST_CONNECTION <= connection <= LAST_CONNECTION:
        return connection
    return UNANNOUNCED
