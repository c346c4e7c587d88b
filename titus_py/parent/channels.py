"""The parent's socket to keyd: opening channels for workers, and hearing what keyd answered.

Run by the parent, which trusts keyd and never waits for it.
"""

import errno
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from socket import SocketType

from keyd.linux.descriptors import packet_pair, send_descriptors
from keyd.protocol import (
    MAX_REFUSAL_OCTETS,
    Done,
    Malformed,
    Open,
    Parting,
    Refusal,
    decode_report,
)
from titus_py.between.event_loop import READABLE, WRITABLE, EventLoop
from titus_py.between.hand_over import enclose
from titus_py.parent.outbox import Tell
from titus_py.parent.worker import Offer

__all__ = ["Channels"]

#: How soon to try again when keyd is gone, or no descriptor was left.
_PAUSE_SECONDS = 0.05
#: How soon to report keyd as lost, and so get another one, when there was no room for it.
_LOST_SECONDS = 1.0
#: How many messages to hear in a row: more than a socket's buffer has room for.
_HEAR_AT_ONCE = 1000
#: So many may have filled it, and each takes no more octets of it than these, as the kernel counts.
#: keyd does not wait for room: others may be lost.
_MAY_BE_FULL, _REPORT_OCTETS = 100, 2048


class Channels:
    """The control socket to keyd, while there is one.

    ``refused`` is called with each refusal that keyd reports, ``done`` with each operation done,
    and ``lost`` after the last of them, with whether keyd has ended and all that it did is known.
    If not, it may still serve its channels, or has done what it could not report.
    """

    def __init__(
        self,
        loop: EventLoop,
        tell: Tell,
        refused: Callable[[Refusal], None],
        done: Callable[[Done], None],
        lost: Callable[[bool], None],
    ) -> None:
        self._loop = loop
        self._tell = tell
        self._refused = refused
        self._operation_done = done
        self._lost = lost
        self._keyd: socket.socket | None = None
        #: From so many reports at once on, others may be lost.
        self._may_be_full = _MAY_BE_FULL
        #: The sets of grants that this keyd has been told of, and what is still to be sent of it.
        self._announced: set[int] = set()
        self._announcing: deque[bytes] = deque()
        #: Whether keyd has shut down its side for writing: it is about to leave.
        self.leaves = False
        #: Whether keyd has said that it is about to, or else has ended at once.
        self._parts = self._killed = False

    @property
    def there(self) -> bool:
        """Whether there is a keyd for clients that have not been accepted yet."""
        return self._keyd is not None and not self.leaves

    def done(self) -> None:
        """No client waits for a channel: hang up on a keyd that is about to leave."""
        if self.leaves:
            self._gone()

    def take(self, descriptors: Sequence[int]) -> None:
        """From now on, use the keyd at this descriptor.

        ``descriptors`` is empty if this process had no descriptor free to receive it. The kernel
        has then closed the connection to keyd, and another one will come. So it will if there is no
        watch left for it.
        """
        # The one before may have ended just now.
        self.catch_up()
        self._lose()
        if not descriptors:
            self._loop.after(_LOST_SECONDS, self._tell_lost)
            return
        keyd = socket.socket(fileno=descriptors[0])
        try:
            self._loop.watch(keyd.fileno(), self.catch_up)
        except OSError:
            keyd.close()
            self._loop.after(_LOST_SECONDS, self._tell_lost)
            return
        keyd.setblocking(False)
        # Ours is as large as keyd's: net.core.wmem_default, which may be less than usual.
        room = keyd.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self._may_be_full = min(_MAY_BE_FULL, room // _REPORT_OCTETS)
        self._keyd = keyd

    def open(
        self,
        connection: int,
        offer: Offer,
        lifetime: float,
        client_hello: bytes,
        sockets: Sequence[SocketType] = (),
    ) -> SocketType | None:
        """Open a worker's channel, for one operation within ``lifetime`` seconds.

        It is for a client that has sent this message, and for none if that is empty. Returns the
        worker's end, with these ``sockets`` within (``hand_over``), or None if that is not possible
        now. The loop wakes up when it is time to try again.
        """
        if self._keyd is None:
            return None
        number = offer.grants.number
        if number not in self._announced:
            self._announced.add(number)
            self._announcing.extend(offer.grants.encode())
        terms = Open(connection, int(lifetime * 1000), 1, number, client_hello)
        try:
            ours, keyds = packet_pair()
        except OSError:
            # No descriptor is left for it.
            self._loop.after(_PAUSE_SECONDS, lambda: None)
            return None
        try:
            while self._announcing:
                self._keyd.send(self._announcing[0])
                self._announcing.popleft()
            if sockets:
                enclose(keyds, sockets)
            _send(self._keyd, terms, keyds)
        except BlockingIOError:
            # Its queue is full: a ClientHello may be long. The loop wakes up when it is not.
            ours.close()
            self._await_room(self._keyd)
            return None
        except OSError:
            ours.close()
            self._loop.after(_PAUSE_SECONDS, lambda: None)
            return None
        finally:
            keyds.close()
        return ours

    def _await_room(self, keyd: socket.socket) -> None:
        if self.leaves:
            self._loop.after(_PAUSE_SECONDS, lambda: None)
            return
        self._loop.rewatch(keyd.fileno(), self._hear_or_go_on, READABLE | WRITABLE)

    def _hear_or_go_on(self) -> None:
        """keyd has said something, or there is room again for whoever waits for a channel."""
        if self._keyd is not None:
            self._loop.rewatch(self._keyd.fileno(), self.catch_up)
            self.catch_up()

    def catch_up(self) -> None:
        """Hear now what keyd has said so far.

        All of it, in each turn of the loop: a turn may be long, and there is not room for many
        reports. keyd does not wait for it.
        """
        heard = 0
        while heard < _HEAR_AT_ONCE and self._hear_one():
            heard += 1
        if heard >= self._may_be_full:
            self._lost(False)

    def _tell_lost(self) -> None:
        if self._keyd is None:
            self._tell("keyd_lost", level="warning")

    def _lose(self) -> None:
        if self._keyd is not None:
            self._loop.unwatch(self._keyd.fileno())
            self._keyd.close()
            self._keyd = None
            self.leaves = self._parts = False
            self._announced.clear()
            self._announcing.clear()
            killed, self._killed = self._killed, False
            self._lost(killed)

    def _gone(self) -> None:
        self._lose()
        self._tell_lost()

    def _hear_one(self) -> bool:
        """Hear one message; returns whether there may be another one."""
        if self._keyd is None or self.leaves:
            return False
        try:
            message = self._keyd.recv(MAX_REFUSAL_OCTETS + 1)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            # keyd ended with orders unread. What it had sent is still there to be heard.
            return True
        if not message:
            # keyd still serves the clients that have been accepted. When it ends, epoll(7) reports
            # the hang-up (EPOLLHUP), even to a caller that waits for no event.
            self.leaves = True
            self._killed = not self._parts and _hung_up(self._keyd)
            self._loop.rewatch(self._keyd.fileno(), self._gone, 0)
            return False
        try:
            report = decode_report(message)
        except Malformed as error:
            self._tell("keyd_incomprehensible", level="error", reason=str(error))
            self._gone()
            return False
        if isinstance(report, Done):
            self._operation_done(report)
        elif isinstance(report, Parting):
            self._parts = True
        else:
            self._refused(report)
        return True


def _hung_up(keyd: socket.socket) -> bool:
    """Whether keyd has closed its socket, and not only said that it will."""
    poll = select.poll()
    poll.register(keyd, 0)
    return bool(poll.poll(0))


def _send(keyd: socket.socket, terms: Open, endpoint: SocketType) -> None:
    """Raises OSError."""
    try:
        send_descriptors(keyd, terms.encode(), [endpoint.fileno()])
    except OSError as error:
        if error.errno != errno.EMSGSIZE:
            raise
        # net.core.wmem_default is less than this ClientHello takes. To wait would be no use: keyd
        # says that it has not seen it.
        send_descriptors(keyd, terms._replace(client_hello=b"").encode(), [endpoint.fileno()])
