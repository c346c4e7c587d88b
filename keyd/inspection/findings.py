"""What ``keyd audit`` has found: one line each. Made in its own processes, which root runs."""

from typing import NamedTuple

from keyd.inspection.watched import Hung

__all__ = ["BROKEN", "HOLDS", "NOT_AVAILABLE", "Finding", "first_of", "key_of", "not_all"]

HOLDS, BROKEN, NOT_AVAILABLE = "holds", "broken", "not available"
#: Of many of which the same is said, so many are named.
_NAMED = 3


class Finding(NamedTuple):
    check: str
    subject: str
    seen: str
    verdict: str


def first_of(names: list[str]) -> str:
    """The first ones, and how many there are besides."""
    named = ", ".join(names[:_NAMED])
    return f"{named} and {len(names) - _NAMED} more" if len(names) > _NAMED else named


def not_all(hung: Hung) -> str:
    if hung.was_not_begun:
        return f"not looked at: {hung.why}"
    return f"not all could be read: {hung.where} ({hung.why})"


def key_of(needle: str) -> str:
    """An audit's needles are called by their key's path, and by what they are of it."""
    return needle.rpartition(": ")[0]
