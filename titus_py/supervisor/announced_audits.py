"""Audits that have announced themselves: what keyd refuses to them is no alarm.

Run by the supervisor, for ``titus-py audit``, which asks keyd for what it must refuse. The
control socket is root's alone, and what is announced is one number, at random, that no
client's connection ever has: a worker does not choose under which number it is refused,
its parent does. So nothing that a worker does is hidden; and it holds for a short time,
and for so many refusals as an audit makes.
"""

import os
import time

__all__ = ["FIRST_CONNECTION", "LAST_CONNECTION", "AnnouncedAudits"]

#: Beyond the microseconds of 142 years (real connections count those since boot), and exact
#: to a reader that takes numbers as doubles.
FIRST_CONNECTION, LAST_CONNECTION = 1 << 52, (1 << 53) - 1
_SECONDS = 60.0
_REFUSALS = 16
_MOST = 8


class _Audit:
    def __init__(self, until: float) -> None:
        self.until = until
        self.left = _REFUSALS


class AnnouncedAudits:
    """Those of the last minute, a few at most; each holds for so many seconds."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._audits: dict[int, _Audit] = {}

    def announce(self) -> int:
        """The number under which this one will be refused."""
        while len(self._audits) >= _MOST:
            del self._audits[next(iter(self._audits))]
        number = FIRST_CONNECTION | int.from_bytes(os.urandom(8)) >> 12
        self._audits[number] = _Audit(time.monotonic() + self._seconds)
        return number

    def expect(self, connection: object) -> bool:
        """Whether a refusal of this connection is an audit's; takes note of it."""
        audit = self._audits.get(connection) if isinstance(connection, int) else None
        if audit is None or not audit.left or time.monotonic() > audit.until:
            return False
        audit.left -= 1
        return True
