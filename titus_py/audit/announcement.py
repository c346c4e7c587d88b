"""What an audit asks the supervisor: for a number, so that keyd's refusals to it raise no alarm.

Run by ``titus-py audit``, as root. The supervisor is trusted with that number, and with
how many clients it has turned away, and no more.
"""

from pathlib import Path
from typing import Any

from keyd.protocol import CONTROL_VERSION
from titus_py.audit.instance import status
from titus_py.supervisor.announced_audits import FIRST_CONNECTION, LAST_CONNECTION
from titus_py.supervisor.control import CONTROL_DIRECTORY
from titus_py.supervisor.control_client import NoAnswer, ask

__all__ = ["OF_ANOTHER_VERSION", "UNANNOUNCED", "announce", "turned_away"]

#: The connection number of an audit that could not announce itself. No client's connection has it.
UNANNOUNCED = 0
#: Of one whose keyd would not understand it. That keyd would take the parent for one that was taken
#: over, from whose socket it is asked, and hang up on it.
OF_ANOTHER_VERSION = -1
_SECONDS = 5.0


def announce(supervisor: int) -> int:
    """The connection number for refusals to this audit.

    UNANNOUNCED if there is none to be had; OF_ANOTHER_VERSION if keyd must not be asked.
    """
    try:
        answer = _ask(supervisor, {"do": "audit"})
    except NoAnswer:
        return UNANNOUNCED
    if answer.get("keyd_hears") != CONTROL_VERSION:
        return OF_ANOTHER_VERSION
    connection = answer.get("connection")
    if isinstance(connection, int) and FIRST_CONNECTION <= connection <= LAST_CONNECTION:
        return connection
    return UNANNOUNCED


def turned_away(supervisor: int) -> dict[str, int]:
    """How many connections it has turned away so far, by limit; empty if it does not say."""
    try:
        counts = _ask(supervisor, {"do": "status"}).get("counts")
    except NoAnswer:
        return {}
    limited = counts.get("limited") if isinstance(counts, dict) else None
    return dict(limited) if isinstance(limited, dict) else {}


def _ask(supervisor: int, question: dict[str, str]) -> dict[str, Any]:
    """Raises NoAnswer, also if it has ended."""
    try:
        # The socket is named after the pid in the supervisor's own pid namespace, and may be in a
        # file system that only the supervisor sees.
        pid = int(status(supervisor)["NSpid"].split()[-1])
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoAnswer(str(error)) from None
    return ask(pid, question, _SECONDS, Path(f"/proc/{supervisor}/root{CONTROL_DIRECTORY}"))
