"""Decides which generation gets the new clients: taking over, handing over, giving up.

Run by the supervisor. A generation that is to take over accepts no client before it is ready.
Until then, and if it fails, the generation before it serves.
"""

import socket
from collections.abc import Callable

from titus_py.between.event_loop import EventLoop
from titus_py.configuration.address import Bindable
from titus_py.configuration.certificate_table import load_seconds
from titus_py.supervisor.backends import Backends
from titus_py.supervisor.child import Child
from titus_py.supervisor.children import START_SECONDS, Children
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.generations import Generations
from titus_py.supervisor.lending_socket import LendingSocket
from titus_py.supervisor.listeners import Listeners
from titus_py.supervisor.record import Record
from titus_py.supervisor.service import Service
from titus_py.supervisor.uid_blocks import UidBlocks

__all__ = ["Awaited", "Takeover"]


class Awaited:
    """A generation that is to take over from the one that serves.

    ``settled`` is called once: with an empty list when it has taken over, else with the reasons
    why it has not. ``patient``: it has the same configuration as the one before, and waits for
    its keyd as long as that takes. ``same_keys``: it does not take over with other keys.
    """

    def __init__(
        self,
        generation: Generation,
        patient: bool,
        settled: Callable[[list[str]], None],
        same_keys: bool = False,
    ) -> None:
        self.generation = generation
        self.patient = patient
        self.settled = settled
        self.same_keys = same_keys


class Takeover:
    def __init__(
        self,
        loop: EventLoop,
        record: Record,
        service: Service,
        generations: Generations,
        children: Children,
        listeners: Listeners,
        uids: UidBlocks,
        backends: Backends,
        lending: LendingSocket,
    ) -> None:
        self._loop = loop
        self._event = self._record = record
        self._service = service
        self._generations = generations
        self._children = children
        self._listeners = listeners
        self._uids = uids
        self._backends = backends
        self._lending = lending
        self.awaited: Awaited | None = None

    def expect(self, awaited: Awaited, added: dict[Bindable, socket.socket]) -> None:
        """A generation is about to be started. ``added`` are the listeners opened for it."""
        self.awaited = awaited
        generation = awaited.generation
        generation.added = added
        if generation.configuration.keyd.socket is not None and not awaited.patient:
            patience = START_SECONDS + load_seconds(generation.certificates)
            self._loop.after(patience, lambda: self.abandon_keyless(generation))

    def awaits(self, generation: Generation) -> bool:
        """Whether this generation is to take over, and has not yet."""
        awaited = self.awaited is not None and self.awaited.generation is generation
        return awaited and not generation.announced

    def awaits_same_keys(self, generation: Generation) -> bool:
        """Whether this generation is to take over, but not with other keys."""
        awaited = self.awaited
        return self.awaits(generation) and awaited is not None and awaited.same_keys

    def ready(self, generation: Generation) -> None:
        """Let a generation accept clients: both of its processes serve."""
        if generation.parent is not None and not generation.retired:
            # Not earlier: if a generation is abandoned, its clients are lost with it.
            # Keepalive not earlier either: another generation accepted on these sockets until now.
            for reason in self._listeners.settle(generation.listening, generation.wishes):
                self._event("socket_file", level="error", reason=reason)
            self._children.order(generation.parent, {"do": "accept"})
        if generation is not self._generations.serving or self._service.stops:
            return
        if not generation.announced:
            generation.announced = True
            for address in self._listeners.wanted(generation.listening):
                self._event("listening", address=str(address), generation=generation.number)
            self._retire_all_but(generation)
        self._lending.lend(generation)
        self._service.ready()

    def abandon(
        self,
        generation: Generation,
        why: str = "keyd or the parent did not start: see the lines above",
    ) -> None:
        """End the awaited generation, which could not be started. The one before goes on."""
        awaited, self.awaited = self.awaited, None
        self.end(generation)
        # Even within a wider address that serves: clients would come to these, unaccepted.
        self._listeners.close(generation.added)
        if awaited is not None:
            awaited.settled([why])
        if self._generations.serving.ready:
            self.ready(self._generations.serving)

    def abandon_awaited(self, generation: Generation, why: str) -> None:
        """Abandon a generation, unless it has taken over or has gone meanwhile."""
        if self.awaits(generation) and not self._service.stops:
            self.abandon(generation, why)

    def abandon_keyless(self, generation: Generation) -> None:
        """Abandon a generation whose keyd, a service of its own, has not been there in time."""
        if generation.waits_for_keyd:
            path = generation.configuration.keyd.socket
            reason = f"keyd.socket: {path}: no keyd listens there, or it does not answer"
            self.abandon_awaited(generation, reason)

    def _retire_all_but(self, generation: Generation) -> None:
        """Leave all new connections to this generation. The others serve those that they have."""
        for other in self._generations:
            if other is not generation and not other.retired:
                other.retired = True
                self._lending.lend_no_more(other)
                if other.parent is None:
                    self.end(other)
                else:
                    other.retiring = True
                    self._children.order(other.parent, {"do": "retire"})
        self._listeners.keep(self._generations.serving.listening)
        self.check_handed_over()

    def check_handed_over(self) -> None:
        """End the reload if only the new generation takes connections now."""
        awaited = self.awaited
        if awaited is None or not awaited.generation.announced:
            return
        if not any(generation.retiring for generation in self._generations):
            self.awaited = None
            self._event("reloaded", generation=awaited.generation.number)
            awaited.settled([])

    # --- ending ---------------------------------------------------------------------

    def end_all(self) -> None:
        """Kill and reap all children."""
        for generation in self._generations:
            for child in generation.children:
                child.kill()
            for child in generation.children:
                self.let_go(generation, child)

    def end(self, generation: Generation) -> None:
        """End what is left of a generation that is not needed any more."""
        for child in generation.children:
            child.kill()
            self.let_go(generation, child)
        self.forget(generation)

    def forget(self, generation: Generation) -> None:
        """Remove a generation without processes."""
        self._generations.remove(generation)
        self._record.metrics.forget(generation.number)
        self._backends.resolve()

    def let_go(self, generation: Generation, child: Child) -> str:
        """Remove a child that has ended or is about to; returns how it ended."""
        generation.starting.discard(child)
        if child is generation.keyd:
            generation.keyd = None
        elif child is generation.parent:
            generation.parent = None
            generation.crippled = False
            generation.huge_pages = generation.huge_pages_of_code = None
            self._record_lost(generation)
            self._uids.give_back(generation)
        return self._children.let_go(child)

    def _record_lost(self, generation: Generation) -> None:
        """Record the connections that ended with their parent, whose end it did not report."""
        lost, generation.connections = generation.connections, {}
        for begun in lost.values():
            self._event("connection_ended", **begun, end="the parent ended")
