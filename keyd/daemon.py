"""What keyd does once it is confined: open channels, hear requests, answer them.

Runs as keyd's own user in an empty root (``keyd.confinement``). It reads from the parent,
which opens channels and is trusted with their terms; from workers, which send requests and
are trusted with nothing; from the supervisor (``keyd.orders``); and, where it lends keys, from
other hosts by way of workers (``keyd.upstream``). It reads no network socket.

One of a few threads waits for events, and handles one after the other (``keyd.lead``). Before
one that takes long, it makes way for another one if others may have to wait, so that slow keys
delay other connections by one signature at most. A channel is armed for one event at a time
(EPOLLONESHOT), so that no two threads ever serve the same channel.
"""

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from keyd.channel import Channel, Refused, reply
from keyd.grants import GrantSets
from keyd.lead import Lead
from keyd.linux import seccomp
from keyd.linux.descriptors import if_any, receive_if_any
from keyd.linux.heap import share_one_heap
from keyd.linux.unix_socket import accept_from, has_ended
from keyd.powers import Key, takes_milliseconds
from keyd.protocol import (
    KEY_IN_REQUEST,
    MAX_CONTROL_OCTETS,
    Done,
    Grants,
    GrantSet,
    Malformed,
    Open,
    Operation,
    Parting,
    Refusal,
    Reply,
    Status,
    decode_control,
)
from keyd.shortage import Shortage
from keyd.sites import Sites
from keyd.tally import Tally
from keyd.words import end_at_the_unforeseen, say

if TYPE_CHECKING:
    from keyd.upstream.stream import Stream

__all__ = ["Keyd"]

#: How often to look for overdue channels, in seconds.
_SWEEP_INTERVAL = 1.0
#: In seconds: how long to leave clients in the listen queue when there is no descriptor or no
#: memory for one.
_ACCEPT_PAUSE = 0.1
#: How many new connections one thread serves before it looks at anything else; and how many it has
#: had put off by then, once one takes long.
_ACCEPTED_AT_ONCE, _MOST_PUT_OFF = 16, 128
#: Plenty for a signature, and not more, since all of it is locked into memory.
_STACK_OCTETS = 512 * 1024
_READABLE_ONCE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT


class _Source(NamedTuple):
    """What to do at these events. It returns what is to be done once others can hear it again."""

    hear: Callable[[], Callable[[], None] | None]
    events: int


class Keyd:
    """The keys, the channels to them, and the threads that serve them.

    ``tick`` is called about once a second; it must not block. ``judged_again`` are the keys that
    other hosts have, which get a client's first message as well.
    """

    def __init__(
        self,
        keys: Mapping[bytes, Key],
        tick: Callable[[], None] = lambda: None,
        judged_again: Collection[bytes] = (),
    ) -> None:
        self._keys = keys
        self._judged_again = judged_again
        self._tick = tick
        self.tally = Tally()
        self.shortage = Shortage()
        self.epoll = select.epoll()
        self.lead = Lead(self.epoll)
        self._channels: dict[int, Channel] = {}
        self._sources: dict[int, _Source] = {}
        #: Those that are registered with ``epoll``, by whoever puts them here.
        self.streams: dict[int, Stream] = {}
        self._parents: set[socket.socket] = set()
        #: What has to end before keyd leaves, and is no channel or parent: the descriptors of
        #: listeners of which a connection may have been accepted that is neither yet, and of
        #: clients that are answered without a channel.
        self.underway: set[int] = set()
        #: Once keyd has been told to leave: the latest time for it, and what to call then.
        self._leaves_at: float | None = None
        self._left: Callable[[], object] = self.stop
        self._swept = time.monotonic()
        self._stopped = threading.Event()

    def serve(
        self,
        threads: int,
        program: bytes,
        ready: Callable[[], None],
        beside: Callable[[], None] | None = None,
    ) -> None:
        """Serve until ``stop``, behind this filter.

        ``threads`` threads take part, this one included, and one more runs ``beside``. ``ready``
        is called when all is set up. Raises OSError where the filter cannot be installed.
        """
        end_at_the_unforeseen()
        threading.stack_size(_STACK_OCTETS)
        share_one_heap()
        door = threading.Barrier(threads)

        def help_out() -> None:
            door.wait()
            self._work()

        helpers = [threading.Thread(target=help_out) for _ in range(threads - 1)]
        for helper in helpers:
            helper.start()
        if beside is not None:
            threading.Thread(target=beside, daemon=True).start()
        seccomp.install(seccomp.Program(program), seccomp.Flag.ALL_THREADS)
        ready()
        door.wait()
        self._work()
        for helper in helpers:
            helper.join()

    def stop(self) -> None:
        self._stopped.set()

    def leave(self, seconds: float, left: Callable[[], object]) -> None:
        """Accept no new clients; ``left`` is called once every channel and parent is gone.

        It is called after so many seconds in any case. Parents learn of this by end of file on
        their socket. Until they close it, they may open channels for clients that they have
        already accepted.
        """
        self._left = left
        self._leaves_at = time.monotonic() + seconds
        for parent in list(self._parents):
            _say_no_more(parent)
        self._leave_if_done()

    def _leave_if_done(self) -> None:
        if self._leaves_at is not None and not (self._parents or self._channels or self.underway):
            self._left()

    def ended(self, descriptor: int) -> None:
        """What was under way with this descriptor is done."""
        self.underway.discard(descriptor)
        if self._leaves_at is not None:
            self._leave_if_done()

    def hear_parent(self, control: socket.socket, gone: Callable[[], None]) -> None:
        """Open channels as this parent asks, tell it what came of them, until it is ``gone``.

        Raises OSError where there is no memory for that.
        """
        sets = GrantSets()

        def record(report: Refusal | Done) -> None:
            try:
                control.send(report.encode(), socket.MSG_DONTWAIT)
            except OSError:
                # A parent that does not keep up misses this report; the tally has counted it.
                # One that was told that keyd leaves can be told nothing more.
                if self._leaves_at is not None and isinstance(report, Refusal):
                    _print_refusal(report)

        def hear() -> None:
            said = receive_if_any(control, MAX_CONTROL_OCTETS + 1, 1)
            if said is None:
                return
            message, descriptors = said
            try:
                ended = not message and has_ended(control)
                order = None if ended else decode_control(message)
                if isinstance(order, GrantSet):
                    sets.add(order)
                elif order is not None:
                    grants = sets.use(order.grants)
            except Malformed as error:
                # Perhaps it has another version than ours. keyd goes on, for other parents.
                say(f"closing the connection to a parent: {error}")
                _say_no_more(control)
                order = None
            if not isinstance(order, Open):
                # None is to come with it.
                for descriptor in descriptors:
                    os.close(descriptor)
                if order is None:
                    del self._sources[control.fileno()]
                    self._parents.discard(control)
                    control.close()
                    gone()
                    self._leave_if_done()
                return
            if descriptors:
                kind = socket.AF_UNIX, socket.SOCK_SEQPACKET, 0
                try:
                    endpoint = socket.socket(*kind, fileno=descriptors[0])
                except OSError as error:
                    # Perhaps the parent was taken over. keyd goes on, for other parents.
                    reason = error.strerror
                    say(f"no channel for connection {order.connection}: {reason}")
                    os.close(descriptors[0])
                else:
                    self.open(order, grants, endpoint, record)
                    return
            else:
                # No descriptor was left for the channel, so it is closed.
                reason = os.strerror(errno.EMFILE)
                self.shortage.say(errno.EMFILE)
            # That client's handshake fails. Its worker, which can be told nothing here, is not to
            # wait for more.
            self.tally.refused(Status.FAILED)
            record(Refusal(order.connection, Status.FAILED, f"no channel: {reason}"))

        self._parents.add(control)
        if self._leaves_at is not None:
            _say_no_more(control)
        try:
            self._arm_source(control, hear)
        except OSError:
            self._parents.discard(control)
            raise

    def part(self) -> None:
        """Have every parent connect anew. Until it closes its socket, it may open channels."""
        for parent in list(self._parents):
            _say_no_more(parent)

    def hear_process(self, process: socket.socket | select.epoll, hear: Callable[[], bool]) -> None:
        """Call ``hear`` when this process says something, until it returns that it has ended.

        Then the socket is closed. Raises OSError where there is no memory for that.
        """

        def hear_once() -> None:
            # It may be a thousand keys.
            self.lead.hand_over()
            if hear():
                del self._sources[process.fileno()]
                process.close()

        self._arm_source(process, hear_once)

    def await_room(self, connection: socket.socket, go_on: Callable[[], None]) -> None:
        """Call ``go_on`` whenever more can be sent, until it calls ``need_no_room``.

        Raises OSError where there is no memory for that.
        """
        self._arm_source(connection, go_on, select.EPOLLOUT)

    def need_no_room(self, connection: socket.socket) -> None:
        del self._sources[connection.fileno()]
        self.epoll.unregister(connection)

    def hear_client(self, client: socket.SocketType, hear: Callable[[], None]) -> None:
        """Call ``hear`` whenever this client has said something, until it is unheard.

        Raises OSError where there is no memory for that.
        """
        self._arm_source(client, hear)

    def unhear(self, client: socket.SocketType) -> None:
        """By the thread that hears it: another one may be about to arm it again."""
        del self._sources[client.fileno()]
        self.epoll.unregister(client)

    def hear_listener(
        self,
        listener: socket.socket,
        accepted: Callable[[int, bool], Callable[[], None] | None],
        ended: Callable[[], bool] = lambda: False,
    ) -> None:
        """Call ``accepted`` with the descriptor of each connection to this listener.

        It returns what takes long, to be done once another thread can hear the listener; or None.
        It is also told whether there is such a thing already: then it is to put off what comes.
        Else each who waits in the listener's queue would have all whom epoll(7) knows go first.
        Once this has ``ended``, by any thread, the next connection is the first that is not
        accepted: others may have this listener, too.
        """
        listener.setblocking(False)

        descriptor = listener.fileno()

        def hear() -> Callable[[], None] | None:
            # A signal may tell keyd to leave at any time from here on.
            self.underway.add(descriptor)
            slow = accept()
            self.underway.discard(descriptor)
            if self._leaves_at is not None:
                self._leave_if_done()
            return slow

        def accept() -> Callable[[], None] | None:
            # Several, while nothing takes long: threads that take turns cost more than they gain.
            slow = None
            for number in range(_MOST_PUT_OFF):
                if slow is None and number == _ACCEPTED_AT_ONCE:
                    break
                if self._leaves_at is not None or ended():
                    # Not armed again: new connections are for the next keyd.
                    del self._sources[descriptor]
                    break
                try:
                    client = accept_from(listener)
                except (BlockingIOError, ConnectionAbortedError):
                    break
                except OSError as error:
                    # EMFILE, ENFILE, ENOBUFS, ENOMEM: the client stays in the queue, and would
                    # wake this thread again and again. The other threads go on.
                    self.shortage.say(error.errno)
                    if slow is None:
                        self.lead.hand_over()
                        time.sleep(_ACCEPT_PAUSE)
                    break
                slow = accepted(client, slow is not None) or slow
            return slow

        self._arm_source(listener, hear)

    def open(
        self,
        terms: Open,
        grants: Sites | Grants,
        endpoint: socket.socket,
        record: Callable[[Refusal | Done], None],
    ) -> None:
        """Serve this channel from now on; ``record`` is told of each answer, and must not block.

        ``grants`` that are not of Sites are for whatever the client's first message was: nobody
        has seen it.
        """
        endpoint.setblocking(False)
        descriptor = endpoint.fileno()
        channel = Channel(terms, grants, endpoint, record, self._judged_again)
        self._channels[descriptor] = channel
        try:
            self.epoll.register(descriptor, _READABLE_ONCE)
        except OSError as error:
            # ENOMEM, ENOSPC: that client's handshake fails.
            say(f"no channel for connection {terms.connection}: {error.strerror}")
            failed = Refused(Status.FAILED, f"no channel: {error.strerror}")
            # Whatever comes of the answer, it is closed: nothing is heard of it.
            channel.hung_up = True
            self._refuse(descriptor, channel, failed)

    def _arm_source(
        self,
        source: socket.SocketType | select.epoll,
        hear: Callable[[], Callable[[], None] | None],
        events: int = select.EPOLLIN,
    ) -> None:
        descriptor = source.fileno()
        self._sources[descriptor] = _Source(hear, events | select.EPOLLONESHOT)
        try:
            self.epoll.register(descriptor, events | select.EPOLLONESHOT)
        except OSError:
            del self._sources[descriptor]
            raise

    def _work(self) -> None:
        while not self._stopped.is_set():
            if self.lead.take(_SWEEP_INTERVAL):
                while self.lead.held and not self._stopped.is_set():
                    self._take_turn(_SWEEP_INTERVAL)
                    self._sweep()
                self.lead.hand_over()

    def _take_turn(self, seconds: float) -> None:
        """Handle one event to the end, if there is one within this time."""
        for descriptor, _ in self.lead.next_event(seconds):
            source = self._sources.get(descriptor)
            if source is not None:
                then = source.hear()
                if self._sources.get(descriptor) is source:
                    self.epoll.modify(descriptor, source.events)
            elif (stream := self.streams.get(descriptor)) is not None:
                then = stream.hear()
                stream.arm()
            else:
                then = None
                self._answer(descriptor, self._channels[descriptor])
            if then is not None:
                self.lead.make_way()
                then()

    def _answer(self, descriptor: int, channel: Channel) -> None:
        message = if_any(lambda: channel.socket.recv(channel.most_octets), b"")
        if message is None:
            self.epoll.modify(descriptor, _READABLE_ONCE)
            return
        if channel.hung_up or (not message and has_ended(channel.socket)):
            self._close(descriptor, channel)
            return
        started = time.monotonic()
        if takes_milliseconds(self._keys.get(message[KEY_IN_REQUEST])):
            self.lead.make_way()
        try:
            operation, result = channel.grant(self._keys, message)
        except Refused as refused:
            self._refuse(descriptor, channel, refused)
            return
        if isinstance(result, bytes):
            self._told(descriptor, channel, operation, started, result)
        else:
            # The channel is not armed before the answer is there: only one thread serves it.
            result(partial(self._told, descriptor, channel, operation, started))

    def _refuse(self, descriptor: int, channel: Channel, refused: Refused) -> None:
        self.tally.refused(refused.status)
        channel.record(Refusal(channel.connection, refused.status, refused.detail))
        if reply(channel, Reply(refused.status)) is not None and not channel.hung_up:
            # Closed, it would look as if keyd had ended, and the worker wait for the next one.
            channel.hang_up()
            self.epoll.modify(descriptor, _READABLE_ONCE)
        else:
            self._close(descriptor, channel)

    def _told(
        self,
        descriptor: int,
        channel: Channel,
        operation: Operation,
        started: float,
        result: bytes | str,
    ) -> None:
        """Answer a request with its result, or with why there is none."""
        failure: str | None
        if isinstance(result, str):
            failure = result
        else:
            # Before the reply: when its worker ends, the parent can know that it has got one.
            channel.record(Done(channel.connection, operation))
            failure = reply(channel, Reply(Status.DONE, result))
            # After the reply, so that the worker does not wait for the tally.
            self.tally.done(operation, time.monotonic() - started)
        if failure is not None:
            failed = Refused(Status.FAILED, f"{operation.name.lower()}: {failure}")
            self._refuse(descriptor, channel, failed)
            return
        self.epoll.modify(descriptor, _READABLE_ONCE)

    def _close(self, descriptor: int, channel: Channel) -> None:
        # Forget the channel before closing it: another one may get its number at once.
        del self._channels[descriptor]
        channel.socket.close()
        self._leave_if_done()

    def _sweep(self) -> None:
        """Once in a while: tick, leave if the time for it is over, and shut down overdue channels.

        A channel is not closed here. The thread that serves it closes it: one that is serving it
        now, or one that the shutdown wakes.
        """
        now = time.monotonic()
        # Python's lock is not given up between this look and the note of it: one thread goes on.
        if now - self._swept < _SWEEP_INTERVAL:
            return
        self._swept = now
        self._tick()
        if self._leaves_at is not None and now > self._leaves_at:
            self._left()
        for channel in list(self._channels.values()):
            if channel.overdue:
                with suppress(OSError):
                    channel.socket.shutdown(socket.SHUT_RDWR)


def _print_refusal(refusal: Refusal) -> None:
    say(f"refused, connection {refusal.connection}, {refusal.status.name}: {refusal.detail}")


def _say_no_more(parent: socket.socket) -> None:
    with suppress(OSError):
        # The end of file alone can be taken for keyd's own end.
        parent.send(Parting().encode(), socket.MSG_DONTWAIT)
    with suppress(OSError):
        parent.shutdown(socket.SHUT_WR)
