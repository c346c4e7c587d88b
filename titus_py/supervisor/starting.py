"""Starts a generation's keyd and parent, the first time and again. Run by the supervisor."""

import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from titus_py.between.event_loop import EventLoop
from titus_py.configuration.checking import Checked
from titus_py.supervisor.backends import Backends
from titus_py.supervisor.child import Child
from titus_py.supervisor.children import Children
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.generations import Generations
from titus_py.supervisor.keyd_service import KeydService
from titus_py.supervisor.listeners import Listeners
from titus_py.supervisor.record import Event
from titus_py.supervisor.service import Service
from titus_py.supervisor.takeover import Takeover
from titus_py.supervisor.uid_blocks import UidBlocks

__all__ = ["Starting"]

#: After so many failures in a row of keyd or the parent, the supervisor gives up. One that has
#: served for so many seconds begins a new row. The time that a start takes does not count: it may
#: take long, and so may the trial of another program before it.
_FAILURES, _FAILURES_SECONDS = 3, 10.0
#: How soon to try again something that cannot be done yet.
_RETRY_SECONDS = 0.05
#: How soon to start keyd again that cannot start, and whose parent serves; each time, the pause
#: doubles.
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0


class Starting:
    """``filters`` are the system call filters for the processes."""

    def __init__(
        self,
        loop: EventLoop,
        event: Event,
        service: Service,
        generations: Generations,
        children: Children,
        takeover: Takeover,
        keyd_service: KeydService,
        listeners: Listeners,
        uids: UidBlocks,
        backends: Backends,
        filters: Mapping[str, str],
    ) -> None:
        self._loop = loop
        self._event = event
        self._service = service
        self._generations = generations
        self._children = children
        self._takeover = takeover
        self._keyd_service = keyd_service
        self._listeners = listeners
        self._uids = uids
        self._backends = backends
        self.filters = filters
        self._failures = 0
        self._pause = _PAUSE_SECONDS
        #: Whether another program is installed, so that a restart may do better.
        self.outdated: Callable[[], bool] = lambda: False

    def prepare(self, checked: Checked) -> Generation:
        """Make a generation, without starting it. Raises OSError, Held."""
        if checked.configuration is not None:
            self._uids.hold(checked.configuration, checked.path)
        generation = Generation(self._generations.next_number, checked, self.filters)
        _prepare_chroot(generation.configuration.worker.chroot)
        for warning in checked.warnings:
            self._event("configuration", level="warning", problem=str(warning))
        for credential, reason in checked.kept:
            file = str(credential.certificate)
            self._event("certificate_kept", level="error", file=file, reason=reason)
        return generation

    def start(self, generation: Generation) -> None:
        """Start its keyd and its parent, as soon as there are uids for the workers."""
        if self._service.ends or generation not in self._generations or generation.retired:
            return
        uids = self._uids.free(generation, self._generations)
        if uids is None:
            # The workers of this generation's last parent are still ending.
            self._loop.after(_RETRY_SECONDS, lambda: self.start(generation))
            return
        try:
            self._start_children(generation, uids)
        except OSError as error:
            self._event("start_failed", level="error", reason=error.strerror)
            if self._takeover.awaits(generation):
                self._takeover.abandon(generation)
                return
            for child in generation.children:
                child.kill()
                self._takeover.let_go(generation, child)
            generation.uids = range(0)
            self.fail(f"start: {error.strerror}")
            self._loop.after(_RETRY_SECONDS, lambda: self.start(generation))

    def _start_children(self, generation: Generation, uids: range) -> None:
        control = None
        external = generation.configuration.keyd.socket is not None
        if not external:
            control = generation.start_keyd(self._predecessor_of(generation))
            self._children.watch(generation, generation.keyd)
        listeners = self._listeners.wanted(generation.listening)
        known = self._backends
        generation.start_parent(control, uids, listeners, known.addresses, known.states)
        self._children.watch(generation, generation.parent)
        if external:
            self._keyd_service.connect(generation)

    def _predecessor_of(self, generation: Generation) -> socket.socket | None:
        """A socket on which the keyd that serves hands over keys, if the new one is to have any."""
        keys = generation.inherited_keys
        before = [one.keyd for one in self._generations if one is not generation and one.keyd]
        if not keys or not before:
            return None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            order = {"do": "hand over", "keys": keys}
            self._children.order(before[-1], order, [ours.fileno()])
        return theirs

    def start_keyd_again(self, generation: Generation) -> None:
        parent = generation.parent
        if self._service.ends or generation.retired or parent is None or generation.keyd:
            return
        try:
            with generation.start_keyd() as control:
                self._children.watch(generation, generation.keyd)
                self._children.order(parent, {"do": "use keyd"}, [control.fileno()])
        except OSError as error:
            self._event("start_failed", level="error", reason=error.strerror)
            if generation.keyd is not None:
                generation.keyd.kill()
                self._takeover.let_go(generation, generation.keyd)
            pause = self.pause_before_keyd(generation, None)
            if pause is None:
                self.fail(f"start of keyd: {error.strerror}")
                pause = _RETRY_SECONDS
            self._loop.after(pause, lambda: self.start_keyd_again(generation))

    def bring_up(self, generation: Generation) -> None:
        """Start what the previous program was about to start of the generation that serves."""
        external = generation.configuration.keyd.socket is not None
        if generation.parent is None:
            self.start(generation)
        elif generation.without_keyd if external else generation.keyd is None:
            if not generation.understands_keyd:
                # As without a fork server: what it has goes on, and another generation follows.
                generation.crippled = True
            elif external:
                self._keyd_service.connect(generation)
            else:
                self.start_keyd_again(generation)
        elif generation.ready:
            self._takeover.ready(generation)

    def pause_before_keyd(self, generation: Generation, ended: Child | None) -> float | None:
        """After how long to start a keyd again that could not start, or has ended before it served.

        None: that counts as a failure. It does not if the parent serves: it keeps its connections.
        A restart would end them, and start the same keyd; unless another program is installed.
        """
        parent = generation.parent
        has_served = ended is not None and ended.ready is not None
        if has_served or parent is None or parent.ready is None or self.outdated():
            self._pause = _PAUSE_SECONDS
            return None
        pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        return pause

    def fail(self, why: str, served: float = 0.0) -> None:
        """Count a failure of what has served for so many seconds, and give up after too many."""
        if self._service.ends:
            return
        if served >= _FAILURES_SECONDS:
            self._failures = 0
        self._failures += 1
        if self._failures == _FAILURES:
            reason = f"{_FAILURES} failures in a row: see the lines above"
            self._event("giving_up", level="alarm", reason=reason)
            self._service.give_up(why)


def _prepare_chroot(directory: Path) -> None:
    """Make the empty directory if it does not exist. ``check`` has looked at one that does.

    Raises OSError, which names the setting.
    """
    try:
        directory.mkdir(mode=0o555, parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"worker.chroot: {directory}: {error.strerror}") from None
