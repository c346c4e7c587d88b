"""How an upstream is, as keyd tells its supervisor."""

from typing import NamedTuple

__all__ = ["CONNECTING", "ORPHANED", "READY", "UpstreamState"]

#: Of those that have all keys; and of those that have just been lost, or were never there.
READY, CONNECTING = "ready", "connecting"
#: Of all, once nothing connects to them any more. One that is connected can still be asked.
ORPHANED = "the process that connects to it has ended"


class UpstreamState(NamedTuple):
    """``state`` is one of the above, or says why it cannot be asked, or not for all keys."""

    upstream: str
    state: str
    #: What it was asked and has not answered; and, since keyd's start, what it has signed, and what
    #: it has refused or left unanswered.
    in_flight: int
    done: int
    failed: int
