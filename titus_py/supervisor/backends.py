"""Backends' addresses: looked up, kept, passed on to the parents. Run by the supervisor."""

from collections.abc import Callable, Iterable

from titus_py.between.event_loop import EventLoop
from titus_py.between.plan import Check, ResolvedAddress, State
from titus_py.configuration.address import Address, NameAddress
from titus_py.supervisor.children import Children
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.record import Event
from titus_py.supervisor.resolver import Addresses, Resolver, numeric
from titus_py.supervisor.unprivileged import UnprivilegedProcess

__all__ = ["Backends"]

#: How long a generation's clients wait for its backends' names to be looked up.
_NAMES_SECONDS = 5.0


class Backends:
    """``ready`` is called with a generation that waited only for a name, and no longer does."""

    def __init__(
        self,
        loop: EventLoop,
        event: Event,
        generations: Iterable[Generation],
        children: Children,
        ready: Callable[[Generation], None],
        process: UnprivilegedProcess,
    ) -> None:
        self._loop = loop
        self._event = event
        self._generations = generations
        self._children = children
        self._ready = ready
        #: The last known addresses of each backend.
        self.addresses: dict[Address, tuple[ResolvedAddress, ...]] = {}
        #: What checks have found of backends, by what the last parent said that checked them.
        self.states: dict[Check, State] = {}
        self._resolver = Resolver(loop, process, self._take)

    def expect(self, generation: Generation) -> None:
        """Make a generation wait, for a limited time, for names without a known address."""
        generation.unresolved = {
            backend
            for backend in generation.backends
            if isinstance(backend, NameAddress) and backend not in self.addresses
        }
        self._loop.after(_NAMES_SECONDS, lambda: self._stop_waiting_for_names(generation))

    def resolve(self) -> None:
        """Look up the backends of all generations, and no others."""
        backends = {backend for generation in self._generations for backend in generation.backends}
        names = [backend for backend in backends if isinstance(backend, NameAddress)]
        for backend in backends:
            if isinstance(backend, NameAddress):
                continue
            # A numeric address needs no lookup, so it is known before any parent is started.
            try:
                self.addresses[backend] = numeric(backend)
            except OSError as error:
                self._unresolved(backend, error.strerror)
        # Of the generation that serves, or is about to.
        every = [one.configuration.worker.resolve_every for one in self._generations][-1:]
        self._resolver.resolve(names, *(every or [0.0]))
        checks = {check for generation in self._generations for check in generation.checks}
        self.states = {check: state for check, state in self.states.items() if check in checks}

    def stop(self) -> None:
        """Look up no names any more."""
        self._resolver.stop()

    def checked(self, check: Check, state: State) -> None:
        self.states[check] = state

    def _take(self, backend: NameAddress, found: Addresses | OSError) -> None:
        """Pass on a backend's new addresses; after a failed lookup, keep the old ones."""
        if isinstance(found, OSError):
            self._unresolved(backend, found.strerror)
        elif self.addresses.get(backend) != found:
            self._pass_on(backend, found)
        self._stop_waiting_for(backend)

    def _unresolved(self, backend: Address, reason: str | None) -> None:
        kept = len(self.addresses.get(backend, ()))
        self._event(
            "backend_unresolved", level="error", backend=str(backend), reason=reason, kept=kept
        )

    def _stop_waiting_for(self, backend: NameAddress) -> None:
        """Stop waiting for this name. A generation that is ready now may serve."""
        for generation in list(self._generations):
            if backend in generation.unresolved:
                generation.unresolved.remove(backend)
                if generation.ready:
                    self._ready(generation)

    def _stop_waiting_for_names(self, generation: Generation) -> None:
        """Serve without the names that are still unknown. Later answers are passed on."""
        for backend in list(generation.unresolved):
            self._unresolved(backend, f"no answer within {_NAMES_SECONDS:g} s")
            self._stop_waiting_for(backend)

    def _pass_on(self, backend: NameAddress, found: Addresses) -> None:
        self.addresses[backend] = found
        order = {"do": "use backend", "backend": str(backend), "addresses": found}
        for generation in self._generations:
            if generation.parent is not None and backend in generation.backends:
                self._children.order(generation.parent, order)
