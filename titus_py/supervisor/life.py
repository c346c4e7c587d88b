"""The supervisor's life: bind, start a generation, keep it running, replace it, stop.

Runs as root from start to end. It hears signals, root's commands and its own children, and nothing
from the network. It never has a private key, and does not load OpenSSL. Each duty has a class of
its own; this file puts them together.
"""

import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial

import prctl

from keyd.linux.credentials import (
    allow_many_descriptors,
    forbid_core_dumps,
    hide_memory,
    keep_capabilities,
    permitted_capabilities,
)
from keyd.linux.systemd import Notifier, passed_sockets
from keyd.linux.title import set_title
from keyd.protocol import CONTROL_VERSION
from titus_py.between.event_loop import EventLoop
from titus_py.between.lookups import MAX_OCTETS
from titus_py.configuration.checking import Checked
from titus_py.configuration.held_uids import Held, HeldUids
from titus_py.fork_server.confinement import TRANSPARENT_CAPABILITIES
from titus_py.supervisor import succession
from titus_py.supervisor.announced_audits import AnnouncedAudits
from titus_py.supervisor.backends import Backends
from titus_py.supervisor.child import ALIVE_SECONDS
from titus_py.supervisor.children import Children
from titus_py.supervisor.control import Answer, Control
from titus_py.supervisor.crippled_keyd import CrippledKeyd
from titus_py.supervisor.cut import Cut
from titus_py.supervisor.exposition import exposition
from titus_py.supervisor.filters import build_filters
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.generations import Generations
from titus_py.supervisor.keyd_service import KeydService
from titus_py.supervisor.lending_socket import LendingSocket
from titus_py.supervisor.listeners import CannotListen, Listeners, Wishes, listen, passed_listeners
from titus_py.supervisor.log import Log
from titus_py.supervisor.metrics_address import MetricsAddress
from titus_py.supervisor.privileges import SUPERVISOR_CAPABILITIES
from titus_py.supervisor.program_change import ProgramChange
from titus_py.supervisor.reaping import reap_orphans
from titus_py.supervisor.record import Record
from titus_py.supervisor.reload import ReadAgain, Reload
from titus_py.supervisor.renewals import Renewals
from titus_py.supervisor.repeated_events import RepeatedEvents
from titus_py.supervisor.service import Service
from titus_py.supervisor.starting import Starting
from titus_py.supervisor.status import Status
from titus_py.supervisor.succession import Legacy
from titus_py.supervisor.takeover import Takeover
from titus_py.supervisor.uid_blocks import UidBlocks
from titus_py.supervisor.unprivileged import UnprivilegedProcess
from titus_py.supervisor.upkeep import Upkeep

__all__ = ["serve", "take_over"]

#: How often to look for changed certificates.
_FILES_SECONDS = 3.0
#: How soon to try again something that cannot be done yet.
_RETRY_SECONDS = 0.05
#: How long the parent may take to end after the drain time.
_STOP_SECONDS = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def serve(checked: Checked, read_again: ReadAgain) -> int:
    """Serve a configuration without mistakes; returns the exit code.

    ``read_again`` reads and checks the configuration anew for a reload; it may be slow.
    """
    if checked.configuration is None:
        raise ValueError("a configuration with mistakes")
    filters = build_filters()
    notify = Notifier()
    passed = passed_listeners(passed_sockets())
    try:
        configuration = checked.configuration
        listeners = listen(configuration.listening, Wishes.of(configuration), passed)
    except CannotListen as error:
        print(f"titus-py: {error}", file=sys.stderr)
        notify(status=f"not started: {error}")
        return 1
    _withdraw(TRANSPARENT_CAPABILITIES if configuration.has_transparent_sockets else ())
    settings = checked.configuration.log
    log = Log(settings.format, least=settings.level)
    return _Supervisor(read_again, filters, Listeners(passed, *listeners), log, notify).run(checked)


def take_over(legacy: Legacy, read_again: ReadAgain) -> int:
    """Go on where this process's previous program left off; returns the exit code.

    ``read_again`` reads the configuration, which takes over as in a reload. Until it serves, and
    if it cannot, the previous configuration is served.
    """
    listeners = succession.inherit_listeners(legacy)
    filters = build_filters()
    # What the previous program had kept: whether it needed it.
    _withdraw(permitted_capabilities() & TRANSPARENT_CAPABILITIES.keys())
    log = Log(legacy.log_format, least=legacy.log_level, lost=legacy.log_lines_lost)
    return _Supervisor(read_again, filters, listeners, log, Notifier()).run(legacy)


def _withdraw(kept: Iterable[int]) -> None:
    """Give up privileges, all but what every supervisor keeps and these capabilities.

    Called before a second thread starts: capabilities are per thread.
    """
    # The title has the options, which tell several instances apart.
    set_title("titus-py", "titus-py: supervisor", *sys.argv[1:])
    forbid_core_dumps()
    hide_memory()
    allow_many_descriptors()
    # Reap orphans here: process 1 might do it late or never, and until then they keep their uids.
    prctl.set_child_subreaper(True)
    # For all that it starts, too: no program on the machine has more to give to any of them.
    prctl.set_no_new_privs(1)
    keep_capabilities([*SUPERVISOR_CAPABILITIES, *kept])


class _Supervisor:
    def __init__(
        self,
        read_again: ReadAgain,
        filters: Mapping[str, str],
        listeners: Listeners,
        log: Log,
        notify: Notifier,
    ) -> None:
        self._loop = loop = EventLoop()
        self._event = self._record = record = Record(log)
        self._service = service = Service(loop, notify, lambda: self._status.line())
        self._listeners = listeners
        self._uids = uids = UidBlocks(loop, record, HeldUids())
        self._audits = AnnouncedAudits()
        self._generations = generations = Generations()
        self._children = children = Children(
            loop,
            record,
            lambda *told: self._upkeep.heard(*told),
            lambda *ended: self._upkeep.ended(*ended),
        )

        def told(name: str) -> dict[str, object]:
            """What a process without privilege is told at its start. Raises OSError."""
            chroot = generations.serving.configuration.worker.chroot
            uid = uids.single(name, generations)
            return {"uid": uid, "chroot": str(chroot), "filter": filters[name]}

        resolver = UnprivilegedProcess(
            loop, record, "resolver", partial(told, "resolver"), MAX_OCTETS
        )
        self._backends = backends = Backends(
            loop,
            record,
            generations,
            children,
            lambda generation: takeover.ready(generation),
            resolver,
        )
        self._lending = lending = LendingSocket(children, record)
        self._takeover = takeover = Takeover(
            loop, record, service, generations, children, listeners, uids, backends, lending
        )
        keyd_service = KeydService(
            loop,
            record,
            service,
            generations,
            children,
            takeover,
            lambda: self._reload.for_keys(),
            lambda: self._reload.lost("keyd", lambda: None),
        )
        self._starting = Starting(
            loop,
            record,
            service,
            generations,
            children,
            takeover,
            keyd_service,
            listeners,
            uids,
            backends,
            filters,
        )
        cut = Cut(loop, record, children)
        self._repeated = repeated = RepeatedEvents(loop, record)
        self._reload = Reload(
            loop,
            record,
            service,
            listeners,
            children,
            uids,
            generations,
            takeover,
            self._starting,
            keyd_service,
            cut,
            read_again,
            self._adopt,
            lambda: self._program_change.begin(self._control),
        )
        self._upkeep = Upkeep(
            loop,
            record,
            repeated,
            service,
            generations,
            takeover,
            self._starting,
            keyd_service,
            self._audits,
            backends,
            cut,
            self._reload.for_keys,
            self._reload.lost,
            self._reload.renew,
            Renewals(loop, record, self._reload.replace).worker_ended,
            CrippledKeyd(loop, self._reload.replace).replace,
        )
        self._metrics = MetricsAddress(
            loop,
            record,
            partial(told, "metrics"),
            lambda: exposition(record.metrics, self._status.all()),
        )
        processes = [resolver, self._metrics.process]
        for name, process in zip(("resolver", "metrics"), processes, strict=True):
            process.lost = partial(self._reload.lost, name)
        self._status = Status(
            record,
            service,
            generations,
            listeners,
            backends,
            keyd_service,
            processes,
            self._reload.lost_processes,
        )
        self._program_change = ProgramChange(
            loop,
            record,
            repeated,
            service,
            generations,
            children,
            listeners,
            uids,
            backends,
            lending,
            self._metrics,
            self._status,
            self._starting,
            self._reload,
            _SIGNALS,
        )
        self._control: Control | None = None
        #: It cannot be made, which was said.
        self._control_missed = False

    # --- life -------------------------------------------------------------------

    def run(self, first: Checked | Legacy) -> int:
        self._hear_signals()
        try:
            if isinstance(first, Checked):
                self._begin(first)
            else:
                self._listen_for_control(first.control)
                self._program_change.go_on(first, self._control)
        except (OSError, Held) as error:
            held = isinstance(error, Held)
            reason = f"worker.uids: {error}" if held else str(error)
            self._event("start_failed", level="error", reason=reason)
            self._service.not_started(reason, 2 if held else 1)
        else:
            self._look_after_children()
            self._service.feed_watchdog()
            self._look_at_files()
        while self._service.exit_code is None:
            self._loop.run_once()
        self._listeners.close_all()
        self._lending.close()
        self._takeover.end_all()
        self._backends.stop()
        self._metrics.stop()
        # When Python ends, it restores the default actions: a further signal would kill us.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self._control is not None:
            self._control.close()
        self._repeated.say_last()
        self._event("stop", code=self._service.exit_code)
        self._record.log.close()
        return self._service.exit_code

    def _begin(self, checked: Checked) -> None:
        """Start the first generation. Raises OSError, Held."""
        self._listen_for_control()
        generation = self._starting.prepare(checked)
        self._event("start", pid=os.getpid(), vhosts=len(generation.configuration.vhost))
        self._generations.append(generation)
        self._adopt(generation)
        self._starting.start(generation)

    def _listen_for_control(self, left: int | None = None) -> None:
        """Listen, on the descriptor that an earlier program has left if there is one."""
        handlers: dict[str, Callable[[Answer], None]] = {
            "status": lambda answer: answer(self._status.all()),
            "reload": self._reload.answer,
            "reload program": partial(self._reload.answer, program=True),
            "reload cut": partial(self._reload.answer, cut=True),
            "audit": self._answer_audit,
        }
        listener = None if left is None else socket.socket(fileno=left)
        try:
            self._control = Control(self._loop, handlers, listener)
            self._control_missed = False
        except OSError as error:
            self._miss_control(error)

    def _miss_control(self, error: OSError) -> None:
        """It is tried again every few seconds, which is said once."""
        if not self._control_missed:
            self._event("no_control_socket", level="warning", reason=str(error))
        self._control_missed = True

    def _look_after_control(self) -> None:
        """Listen if there was no place for the socket, or somebody has removed its file.

        That may have been with other files: the uids are held anew as well, where other instances
        see it.
        """
        if self._control is None:
            self._listen_for_control()
            return
        try:
            if not self._control.look_after():
                return
        except OSError as error:
            self._miss_control(error)
            return
        self._control_missed = False
        self._event("control_socket_removed", level="warning", action="made anew")
        self._uids.hold_again(self._generations)

    def _answer_audit(self, answer: Answer) -> None:
        connection = self._audits.announce()
        self._event("audit_announced", connection=connection)
        answer({"connection": connection, "keyd_hears": CONTROL_VERSION})

    def _hear_signals(self) -> None:
        """Have signals wake the loop by octets on a socket (signal.set_wakeup_fd)."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._wakeup = ours, theirs
        # The socket only wakes the loop: it may not hold an octet for each of many signals.
        noted: deque[int] = deque()

        def hear() -> None:
            with suppress(BlockingIOError):
                while ours.recv(4096):
                    continue
            while noted:
                number = noted.popleft()
                if number == signal.SIGHUP:
                    self._reload.begin()
                else:
                    self._stop(signal.Signals(number).name)

        def watch() -> None:
            try:
                self._loop.watch(ours.fileno(), hear)
            except OSError:
                # No watch is left, or no memory. Until there is, it looks for signals now and then.
                self._loop.after(_RETRY_SECONDS, look)

        def look() -> None:
            hear()
            watch()

        for number in _SIGNALS:
            signal.signal(number, lambda number, _: noted.append(number))
        watch()
        # Signals that came while the program was replaced were blocked; they arrive now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _stop(self, reason: str) -> None:
        """At the first call, let connections end. At the second, end them."""
        self._service.stops += 1
        self._listeners.close_all()
        drain = self._generations.serving.configuration.worker.drain
        self._service.stop(drain + 2 * _STOP_SECONDS)
        if self._service.stops == 1:
            self._event("stopping", reason=reason, drain=drain)
            order: dict[str, object] = {"do": "drain", "seconds": drain}
        else:
            self._event("stopping_at_once", level="warning", reason=reason)
            order, drain = {"do": "close"}, 0.0
        for generation in self._generations:
            # Other hosts' streams never end by themselves.
            self._lending.lend_no_more(generation)
        parents = self._generations.parents
        for parent in parents:
            self._children.order(parent, order)
            self._loop.after(drain + _STOP_SECONDS, parent.kill)
        if not parents:
            self._service.end(0)

    def _adopt(self, generation: Generation) -> None:
        """Apply its configuration to sockets, log, backends. On OSError, to some sockets only."""
        self._lending.change(list(self._generations))
        self._metrics.change(generation.configuration.metrics.address)
        for address in self._listeners.unheard(generation.listening):
            self._event("not_accepted", level="warning", address=str(address))
        log = generation.configuration.log
        self._record.log.form, self._record.log.least = log.format, log.level
        self._backends.expect(generation)
        self._backends.resolve()

    def _look_after_children(self) -> None:
        self._children.look_after(self._generations)
        reap_orphans()
        self._look_after_control()
        self._service.tell_status()
        self._loop.after(ALIVE_SECONDS, self._look_after_children)

    def _look_at_files(self) -> None:
        """Reload if a certificate or key file has changed, and that is configured."""
        serving = self._generations.serving
        if serving.configuration.service.reload_on_change and serving.files.settled_change():
            self._event("files_changed", action="reloading")
            self._reload.begin()
        self._loop.after(_FILES_SECONDS, self._look_at_files)
