"""The parent's way to keyd: opening a worker's channel, and hearing what keyd refused.

Run by the parent, which trusts keyd and never waits for it.
"""

import socket
from collections.abc import Callable, Sequence

from keyd.linux.descriptors import send_descriptors
from keyd.protocol import MAX_REFUSAL_OCTETS, Malformed, Open, Refusal
from titus_py.between.event_loop import EventLoop
from titus_py.parent.outbox import Tell
from titus_py.parent.worker import Offer

__all__ = ["Channels"]

#: How soon to look again for a keyd that could not take a message.
_PAUSE_SECONDS = 0.05
#: How soon to ask for another keyd where there was no descriptor for one.
_LOST_SECONDS = 1.0


class Channels:
    """The control socket of the keyd that there is, if there is one.

    ``refused`` is called with each refusal that keyd tells of.
    """

    def __init__(self, loop: EventLoop, tell: Tell, refused: Callable[[Refusal], None]) -> None:
        self._loop = loop
        self._tell = tell
        self._refused = refused
        self._keyd: socket.socket | None = None
        #: It has said, by closing its side, that it is about to leave.
        self._leaves = False

    @property
    def there(self) -> bool:
        """Whether there is a keyd for clients that are yet to be accepted."""
        return self._keyd is not None and not self._leaves

    def done(self) -> None:
        """Nobody waits for a channel: a keyd that is about to leave may do so."""
        if self._leaves:
            self._gone()

    def take(self, descriptors: Sequence[int]) -> None:
        """Use the keyd that this descriptor leads to from now on.

        Where there was no number left for it, keyd has been hung up on: there will be another.
        """
        self._lose()
        if not descriptors:
            self._loop.after(_LOST_SECONDS, self._tell_lost)
            return
        keyd = socket.socket(fileno=descriptors[0])
        keyd.setblocking(False)
        self._keyd = keyd
        self._loop.watch(keyd.fileno(), self._hear)

    def open(self, connection: int, offer: Offer, lifetime: float) -> socket.socket | None:
        """A worker's channel, for one operation within ``lifetime`` seconds.

        None if there is none for now: the loop wakes up when it is time to ask again.
        """
        if self._keyd is None:
            return None
        terms = Open(connection, int(lifetime * 1000), operations=1, grants=offer.grants)
        try:
            ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            # No descriptor is left for it.
            self._loop.after(_PAUSE_SECONDS, lambda: None)
            return None
        with keyds:
            try:
                send_descriptors(self._keyd, terms.encode(), [keyds.fileno()])
            except OSError:
                # Full or gone. If it is alive, it will have caught up in a moment.
                ours.close()
                self._loop.after(_PAUSE_SECONDS, lambda: None)
                return None
        return ours

    def _tell_lost(self) -> None:
        if self._keyd is None:
            self._tell("keyd_lost", level="warning")

    def _lose(self) -> None:
        if self._keyd is not None:
            self._loop.unwatch(self._keyd.fileno())
            self._keyd.close()
            self._keyd = None
            self._leaves = False

    def _gone(self) -> None:
        self._lose()
        self._tell_lost()

    def _hear(self) -> None:
        if self._keyd is None:
            return
        try:
            message = self._keyd.recv(MAX_REFUSAL_OCTETS + 1)
        except BlockingIOError:
            return
        except ConnectionResetError:
            message = b""
        if not message:
            # Those who are accepted already it still serves. One that has ended hangs up, which
            # is heard whatever is waited for.
            self._leaves = True
            self._loop.unwatch(self._keyd.fileno())
            self._loop.watch(self._keyd.fileno(), self._gone, 0)
            return
        try:
            refusal = Refusal.decode(message)
        except Malformed as error:
            self._tell("keyd_incomprehensible", level="error", reason=str(error))
            return
        self._refused(refusal)
