"""Announced audits: when keyd refuses a request of theirs, that is no alarm.

Run by the supervisor, for ``titus-py audit``, which asks keyd for what it must refuse. Only
root can use the control socket. The audit gets a random connection number that no client's
connection ever has. A worker cannot choose that number for its own requests: its parent sets
it. So no refusal of a worker's request is hidden. An announcement holds for a short time, and
for as many refusals as an audit needs.
"""

import os
import time

__all__ = ["FIRST_CONNECTION", "LAST_CONNECTION", "AnnouncedAudits"]

#: Real connections are numbered by microseconds since boot: these begin after 142 years of them.
#: They are exact even for a reader that takes numbers as doubles.
FIRST_CONNECTION, LAST_CONNECTION = 1 << 52, (1 << 53) - 1
_SECONDS = 60.0
_REFUSALS = 16
_MOST = 8


class _Audit:
    def __init__(self, until: float) -> None:
        self.until = until
        self.left = _REFUSALS


class AnnouncedAudits:
    """The latest announced audits, a few at most. Each holds for ``seconds``."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._audits: dict[int, _Audit] = {}

    def announce(self) -> int:
        """Announce an audit; returns the connection number for its requests."""
        while len(self._audits) >= _MOST:
            del self._audits[next(iter(self._audits))]
        number = FIRST_CONNECTION | int.from_bytes(os.urandom(8)) >> 12
        self._audits[number] = _Audit(time.monotonic() + self._seconds)
        return number

    def expect(self, connection: object) -> bool:
        """Whether a refusal to this connection is an audit's. If so, counts it."""
        audit = self._audits.get(connection) if isinstance(connection, int) else None
        if audit is None or not audit.left or time.monotonic() > audit.until:
            return False
        audit.left -= 1
        return True
