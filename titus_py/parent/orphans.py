"""Clients whose keyd has ended before it signed for them: each gets a channel to the next one.

Run by the parent. keyd says what it has done before it answers. So, when all that it said has been
heard, the parent knows for whom it has done nothing: for these, another channel allows nothing that
the first one did not. A keyd that the parent has hung up on still serves the channels that it has,
and nobody hears of that: those who have one there get no other.
"""

import time
from collections import deque
from collections.abc import Mapping

from titus_py.between import messages
from titus_py.between.hand_over import give
from titus_py.between.plan import Plan
from titus_py.parent.channels import Channels
from titus_py.parent.worker import Offer, Worker

__all__ = ["Orphans"]

#: A channel's lifetime is in milliseconds.
_LEAST_SECONDS = 0.001


class Orphans:
    """The workers of these clients. ``handshaking`` are those whose handshake is not done."""

    def __init__(self, plan: Plan, handshaking: Mapping[int, Worker]) -> None:
        self._plan = plan
        self._handshaking = handshaking
        #: Those that wait for the next keyd.
        self._orphans: deque[tuple[Worker, Offer]] = deque()

    def lost(self, known: bool) -> None:
        """keyd has ended, and what it did is ``known``; or it is not, of those that there are now.

        Whoever has lost one before may be why: it gets no third channel.
        """
        for worker in self._handshaking.values():
            if worker.orphaned or worker.offer is None or not worker.offer.grants.grants:
                continue
            if known and not worker.signed:
                worker.orphaned = True
                self._orphans.append((worker, worker.offer))
            else:
                # Most have their answer. One that has not is not to wait for what does not come.
                worker.deny_channel()

    def serve(self, channels: Channels) -> None:
        """Give channels to those that still wait, as far as that is possible now."""
        while self._orphans:
            worker, offer = self._orphans[0]
            if self._handshaking.get(worker.uid) is not worker or worker.killed_for:
                self._orphans.popleft()
                continue
            left = worker.started + self._plan.handshake_timeout - time.monotonic()
            if left < _LEAST_SECONDS:
                worker.deny_channel()
            else:
                channel = channels.open(worker.connection, offer, left, worker.client_hello)
                if channel is None:
                    return
                try:
                    give(worker.socket, messages.CHANNEL, [channel])
                except OSError:
                    worker.deny_channel()
            self._orphans.popleft()
