"""``titus-py reload --program``: becoming another program, and going on as one.

Run by the supervisor. The one that leaves has the installed program tried out, gathers all that it
knows, and executes it in its own process. The one that comes takes all of that over, and goes on
with the reload. ``succession`` is what the two say to each other.
"""

import os
import signal
import socket
import sys
from collections.abc import Iterable

from titus_py.between.event_loop import EventLoop
from titus_py.between.plan import resolved
from titus_py.configuration.address import parse_backend
from titus_py.configuration.held_uids import HeldUids
from titus_py.supervisor import reaping, succession
from titus_py.supervisor.backends import Backends
from titus_py.supervisor.children import START_SECONDS, Children
from titus_py.supervisor.control import Control
from titus_py.supervisor.generations import Generations
from titus_py.supervisor.lending_socket import LendingSocket
from titus_py.supervisor.listeners import Listeners
from titus_py.supervisor.log import Log
from titus_py.supervisor.metrics_address import MetricsAddress
from titus_py.supervisor.record import Record
from titus_py.supervisor.reload import READ_SECONDS, Reload
from titus_py.supervisor.repeated_events import RepeatedEvents
from titus_py.supervisor.service import Service
from titus_py.supervisor.starting import Starting
from titus_py.supervisor.status import Status
from titus_py.supervisor.succession import Legacy, Trial
from titus_py.supervisor.uid_blocks import UidBlocks

__all__ = ["ProgramChange"]

#: How soon to try again while children have not taken their orders yet.
_RETRY_SECONDS = 0.05


class ProgramChange:
    """``signals`` are those that the supervisor hears. They wait for the next program."""

    def __init__(
        self,
        loop: EventLoop,
        record: Record,
        repeated: RepeatedEvents,
        service: Service,
        generations: Generations,
        children: Children,
        listeners: Listeners,
        uids: UidBlocks,
        backends: Backends,
        lending: LendingSocket,
        metrics: MetricsAddress,
        status: Status,
        starting: Starting,
        reload: Reload,
        signals: Iterable[signal.Signals],
    ) -> None:
        self._loop = loop
        self._record = record
        self._repeated = repeated
        self._service = service
        self._generations = generations
        self._children = children
        self._listeners = listeners
        self._uids = uids
        self._backends = backends
        self._lending = lending
        self._metrics = metrics
        self._status = status
        self._starting = starting
        self._reload = reload
        self._signals = signals

    # --- the program that leaves --------------------------------------------------

    def begin(self, control: Control | None) -> None:
        """Try out the installed program, and then become it."""
        # Without the service manager's variables: they are for the program that serves.
        legacy, environment = self._legacy(control), dict(os.environ)
        seconds = START_SECONDS if legacy.urgent else READ_SECONDS
        self._reload.aside(
            lambda: succession.try_out(legacy, environment, seconds),
            lambda trial: self._become(trial, control),
        )

    def _become(self, trial: Trial, control: Control | None) -> None:
        """Become the new program if its trial found no problems. Else go on as this one."""
        if self._service.stops:
            return
        if trial.problems:
            self._reload.failed(trial.problems, not trial.starts)
            return
        children = [child for one in self._generations for child in one.children]
        if not all(child.has_heard_all and child.socket.fileno() >= 0 for child in children):
            # Only this program can send the orders that children have not taken yet.
            self._loop.after(_RETRY_SECONDS, lambda: self._become(trial, control))
            return
        # The new program starts its own.
        self._backends.stop()
        self._metrics.stop()
        log = self._record.log
        self._repeated.say_last()
        log.close()
        # The environment that this program was started with.
        environment = {**os.environ, **self._service.environment}
        try:
            succession.execute(self._legacy(control), environment, self._signals)
        except OSError as error:
            self._record.log = Log(log.form, least=log.least, lost=log.lost)
            self._backends.resolve()
            self._metrics.serve()
            self._reload.failed([f"{sys.executable}: {error.strerror}"])

    def _legacy(self, control: Control | None) -> Legacy:
        """All that the next program needs to go on from here."""
        log, metrics = self._record.log, self._metrics.listener
        return Legacy(
            generations=[succession.leave(generation) for generation in self._generations],
            listeners=succession.leave_listeners(self._listeners),
            held_uids=self._uids.held.descriptor,
            used_uids=[(uids.start, uids.stop) for uids in self._uids.used],
            addresses=[
                (str(backend), [list(address) for address in addresses])
                for backend, addresses in self._backends.addresses.items()
            ],
            states=list(self._backends.states.items()),
            control=control.listener.fileno() if control else None,
            answers=succession.who_waits(self._reload.answers),
            later_answers=succession.who_waits(self._reload.later_answers),
            asked_again=self._reload.asked_again,
            program_asked=self._reload.program_asked,
            urgent=self._reload.urgent,
            metrics=None if metrics is None else metrics.fileno(),
            metrics_address=self._metrics.address,
            lending=self._lending.left,
            late=reaping.leave(),
            counts=self._record.metrics.leave(),
            log_format=log.form,
            log_level=log.least,
            log_lines_lost=log.lost,
            started=self._status.started,
            begun=self._status.begun,
        )

    # --- the program that comes ---------------------------------------------------

    def go_on(self, legacy: Legacy, control: Control | None) -> None:
        """Take over everything, then go on with the reload."""
        self._status.started, self._status.begun = legacy.started, legacy.begun
        self._record.metrics.inherit(legacy.counts)
        if control is not None:
            for answers, clients in (
                (self._reload.answers, legacy.answers),
                (self._reload.later_answers, legacy.later_answers),
            ):
                answers += [control.adopt(socket.socket(fileno=one)) for one in clients]
        self._reload.asked_again = legacy.asked_again
        self._reload.program_asked = legacy.program_asked
        for backend, addresses in legacy.addresses:
            self._backends.addresses[parse_backend(backend)] = resolved(addresses)
        self._backends.states = dict(legacy.states)
        self._uids.held = HeldUids(legacy.held_uids)
        for left in legacy.generations:
            generation = succession.inherit(left, self._starting.filters)
            self._generations.append(generation)
            for child in generation.children:
                self._children.adopt(generation, child)
        for first, beyond in legacy.used_uids:
            self._uids.used.append(range(first, beyond))
            self._uids.release(self._uids.used[-1])
        self._backends.resolve()
        if legacy.metrics is not None:
            self._metrics.adopt(legacy.metrics_address, socket.socket(fileno=legacy.metrics))
        self._lending.adopt(legacy.lending)
        reaping.inherit(legacy.late)
        serving = self._generations.serving
        self._record(
            "program_changed",
            pid=os.getpid(),
            version=self._status.version,
            generation=serving.number,
        )
        self._service.reloading = True
        self._starting.bring_up(serving)
        self._reload.read()
