"""What tokens did for keyd, by their names, since the supervisor's start. Run by the supervisor.

Each generation's keyd tells its totals. Their form has been checked (``child_events``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from titus_py.supervisor.counting import Tally

__all__ = ["TokenCounts"]

_ROOM = 64


class TokenCounts:
    """Signatures, failures and logins of each token."""

    def __init__(self) -> None:
        self.signed, self.failed, self.logins = (Tally(room=_ROOM) for _ in range(3))
        #: What each generation's keyd last told of each token, in this order.
        self._told: dict[int, Mapping[str, Sequence[int]]] = {}

    @property
    def tallies(self) -> dict[str, Tally]:
        return {
            "tokens_signed": self.signed,
            "tokens_failed": self.failed,
            "token_logins": self.logins,
        }

    def told(self, fields: Mapping[str, Any], generation: int) -> None:
        """Count the totals of a generation's keyd."""
        before, now = self._told.get(generation, {}), fields["tokens"]
        self._told[generation] = now
        for token, counts in now.items():
            last = before.get(token, (0, 0, 0))
            for tally, count, counted in zip(self.tallies.values(), counts, last, strict=True):
                # Fewer than before: another keyd, whose start was not heard.
                tally.add(token, count - counted if count >= counted else count)

    def forget(self, generation: int) -> None:
        """The keyd of this generation is gone, or another one that counts from zero."""
        self._told.pop(generation, None)

    def leave(self) -> dict[str, Any]:
        """For the next program; the tallies are left with all the others."""
        return {str(generation): told for generation, told in self._told.items()}

    def inherit(self, left: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._told = {int(generation): told for generation, told in left.items()}
