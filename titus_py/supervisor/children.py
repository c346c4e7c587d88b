"""The children's sockets and ends: sends orders, hears events, notices that a child has ended.

Run by the supervisor. It does not trust its children: what one says that is not its to say, or not
in its form (``child_events``), ends that child. ``upkeep`` decides what is done about events.
"""

import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from keyd.linux.descriptors import receive_descriptors
from titus_py.between.event_loop import EventLoop
from titus_py.between.report import NoReport, complete_record, read_report
from titus_py.configuration.certificate_table import load_seconds
from titus_py.parent.outbox import MESSAGE_OCTETS
from titus_py.supervisor.child import ALIVE_SECONDS, Child
from titus_py.supervisor.child_events import Said, Unintelligible, decode
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.lingering import hear_alarms, not_lingering
from titus_py.supervisor.record import Event

__all__ = ["START_SECONDS", "Children"]

#: How long keyd may take to load its keys, and the parent its certificates.
START_SECONDS = 60.0
#: How long a child may be silent before it counts as hung. It reports every few seconds that it
#: is alive.
_QUIET_SECONDS = 15.0
#: How soon to send an order again that a child could not take.
_RETRY_SECONDS = 0.05
#: How soon to try again to watch a child that the previous program has left.
_WATCH_SECONDS = 1.0
#: The most that a message can have (SCM_MAX_FD, unix(7)): so ``decode`` sees those that are too
#: many.
_MOST_DESCRIPTORS = 253
#: How many messages to hear in a row from a child before anything else is served: each may have
#: many events.
_HEAR_AT_ONCE = 10


class Children:
    """``heard`` is called with each event of a child. ``ended`` is called when a child has ended
    and all its events were heard; it has to call ``let_go``.
    """

    def __init__(
        self,
        loop: EventLoop,
        event: Event,
        heard: Callable[[Generation, Child, str, dict[str, Any]], None],
        ended: Callable[[Generation, Child], None],
    ) -> None:
        self._loop = loop
        self._event = event
        self._heard = heard
        self._ended = ended
        hear_alarms()
        #: When ``look_after`` last ran.
        self._looked = time.monotonic()

    def watch(self, generation: Generation, child: Child | None) -> None:
        """Raises OSError; then the child is to be let go."""
        if child is None:
            return
        with ExitStack() as undo:
            self._loop.watch(child.pidfd, lambda: self._hear_last(generation, child))
            undo.callback(self._loop.unwatch, child.pidfd)
            self._loop.watch(child.socket.fileno(), lambda: self._hear(generation, child))
            undo.pop_all()
        child.watched = True
        if child in generation.starting:
            # keyd reads and checks every key. Decrypting one may be made slow on purpose.
            patience = START_SECONDS + load_seconds(generation.certificates)
            child.patience = self._loop.after(patience, child.kill)

    def adopt(self, generation: Generation, child: Child, told: bool = False) -> None:
        """Watch a child of the previous program's: now, or once there is a watch for it."""
        if child not in generation.children:
            return
        try:
            self.watch(generation, child)
        except OSError as error:
            if not told:
                reason = f"{child.name} cannot be watched: {error.strerror}"
                self._event("start_failed", level="error", reason=reason, pid=child.pid)
            self._loop.after(_WATCH_SECONDS, lambda: self.adopt(generation, child, told=True))

    def order(
        self, child: Child, order: Mapping[str, object], descriptors: Sequence[int] = ()
    ) -> None:
        """Send a child an order: now, or once it has taken the earlier ones."""
        if child.queue(order, descriptors):
            self._send_orders(child)

    def let_go(self, child: Child) -> str:
        """Stop watching a child that has ended or is about to; returns how it ended."""
        if child.patience is not None:
            child.patience.cancel()
        if child.watched:
            self._loop.unwatch(child.pidfd)
        with not_lingering():
            self._hang_up(child)
            return child.bury()

    def look_after(self, generations: Iterable[Generation]) -> None:
        """Kill a child that has gone silent: its successor will serve."""
        now = time.monotonic()
        # If we were not running ourselves (SIGSTOP, a paused virtual machine), silence means
        # nothing.
        was_away = now - self._looked > 2 * ALIVE_SECONDS
        self._looked = now
        for generation in generations:
            for child in generation.children:
                if was_away or not child.watched:
                    # Nor if nobody has listened yet (``adopt``).
                    child.last_heard = now
                if child not in generation.starting and now - child.last_heard > _QUIET_SECONDS:
                    self._event(f"{child.name}_hangs", level="alarm", pid=child.pid)
                    child.kill()

    def _send_orders(self, child: Child) -> None:
        if not child.send_orders():
            self._loop.after(_RETRY_SECONDS, lambda: self._send_orders(child))

    def _hear_last(self, generation: Generation, child: Child) -> None:
        """Hear what a child had sent before it ended.

        Another process may have its end of the socket, and can send nothing from now on.
        """
        with suppress(OSError):
            child.socket.shutdown(socket.SHUT_RD)
        while child.socket.fileno() >= 0 and self._hear(generation, child):
            continue
        self._ended(generation, child)

    def _hear(self, generation: Generation, child: Child) -> bool:
        """Hear a child's events; returns whether there may be more."""
        with not_lingering():
            for _ in range(_HEAR_AT_ONCE):
                try:
                    message, reports = receive_descriptors(
                        child.socket, MESSAGE_OCTETS, _MOST_DESCRIPTORS
                    )
                except BlockingIOError:
                    return False
                except ConnectionResetError:
                    # The child ended without reading all orders. Its events can still be read.
                    continue
                if not message:
                    self._hang_up(child)
                    return False
                try:
                    for said in decode(child.name, message, reports):
                        name = _understood(generation, child, said)
                        self._heard(generation, child, name, said.fields)
                    if child is not generation.parent or not generation.retiring:
                        # Of a parent that is to retire, nothing counts before it says that it has:
                        # no reload would end, and none begin.
                        child.last_heard = time.monotonic()
                except (Unintelligible, NoReport) as error:
                    self._event(
                        "unintelligible",
                        level="alarm",
                        process=child.name,
                        pid=child.pid,
                        reason=str(error),
                    )
                    child.kill()
                    # Whoever runs code in it may have sent more. None of that is heard.
                    self._hang_up(child)
                    return False
                finally:
                    for report in reports:
                        os.close(report)
        return True

    def _hang_up(self, child: Child) -> None:
        """Hear nothing more of it."""
        if child.socket.fileno() >= 0:
            if child.watched:
                self._loop.unwatch(child.socket.fileno())
            child.socket.close()


def _understood(generation: Generation, child: Child, said: Said) -> str:
    """Complete an event for the record; returns its name there. Raises Unintelligible, NoReport."""
    name, event, report = said
    if name == "ready" and child not in generation.starting:
        raise Unintelligible("ready for the second time")
    if name != "connection_over":
        return name
    if report is not None:
        return complete_record(event, read_report(report))
    if event.get("uid") is None:
        # It had no worker, and so has no report.
        return "handshake_failed" if event.get("tunnel") is None else "tunnel_failed"
    # No descriptor was left to receive the report.
    event["end"] = event["end"] or "not known: no descriptor for its report"
    return "connection_ended"
