"""The supervisor's life: bind, start keyd and the parent, keep them running, replace them, stop.

Runs as root, from beginning to end. It hears signals and its own children; never a
client's octet, never a private key, and it does not load OpenSSL. What its
children say is trusted with the log, and with nothing else.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import prctl

from keyd.linux import seccomp
from keyd.linux.credentials import (
    allow_many_descriptors,
    forbid_core_dumps,
    hide_memory,
    keep_capabilities,
)
from keyd.linux.descriptors import receive_descriptors
from keyd.linux.systemd import Notifier, passed_sockets
from keyd.linux.title import set_title
from keyd.protocol import MAX_KEYS_OCTETS, Keys, Malformed, fingerprint
from keyd.system_calls import SERVING
from titus_py.between.event_loop import EventLoop
from titus_py.between.plan import ResolvedAddress, address_text, resolved
from titus_py.between.report import complete_record, read_report
from titus_py.configuration import Configuration
from titus_py.configuration.address import (
    Address,
    IPAddress,
    NameAddress,
    UnixAddress,
    parse_backend,
)
from titus_py.configuration.checking import Checked
from titus_py.configuration.held_uids import Held, HeldUids, any_process_has, process_with
from titus_py.parent.keepalive import keep_alive
from titus_py.supervisor import succession
from titus_py.supervisor.announced_audits import AnnouncedAudits
from titus_py.supervisor.control import Answer, Control
from titus_py.supervisor.exposition import exposition
from titus_py.supervisor.generation import (
    ALIVE_SECONDS,
    Child,
    Generation,
    free_block,
)
from titus_py.supervisor.listeners import CannotListen, listen, passed_listeners, unwanted
from titus_py.supervisor.log import Log
from titus_py.supervisor.metrics import Metrics
from titus_py.supervisor.metrics_server import MetricsServer, listen_at
from titus_py.supervisor.privileges import SUPERVISOR_CAPABILITIES
from titus_py.supervisor.resolver import Addresses, Resolver, numeric
from titus_py.supervisor.succession import Legacy
from titus_py.worker.system_calls import ESTABLISHED, HANDSHAKE

__all__ = ["serve", "take_over"]

#: So many failures of keyd or the parent within so many seconds, and the supervisor gives up.
_FAILURES, _FAILURES_SECONDS = 3, 10.0
#: How long keyd may take to load its keys, and the parent its certificates.
_START_SECONDS = 60.0
#: When to look once more for what a parent has left.
_ORPHANS_SECONDS = 1.0
#: How long reading the configuration and the files that it names may take: longer than
#: checking the most certificates that there may be.
_READ_SECONDS = 1000.0
#: How long a child may say nothing at all before it is taken to hang: it says that it is
#: alive every few seconds.
_QUIET_SECONDS = 15.0
#: How often to look for changed certificates.
_FILES_SECONDS = 3.0
#: How soon to look again for a keyd that is not there.
_KEYD_SECONDS = 0.2
#: How long a generation's clients wait for its backends' names to be looked up.
_NAMES_SECONDS = 5.0
#: How soon to try again what could not be done for now.
_RETRY_SECONDS = 0.05
#: How often, at the least, to look whether uids have become free.
_UIDS_SECONDS = 1.0
#: How long beyond the drain time the parent has to end.
_STOP_SECONDS = 5.0
#: How many virtual hosts one message to the parent may name.
_ORDER_VHOSTS = 1000
#: What children say that is of no interest to a reader.
_NOT_FOR_THE_LOG = frozenset({"retired", "alive", "operations"})
_ENDS = frozenset({"connection_ended", "handshake_failed"})
_EVENT_OCTETS = 64 * 1024
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_Found = TypeVar("_Found")


def serve(checked: Checked, read_again: Callable[[], Checked]) -> int:
    """Serve a configuration without mistakes; returns the exit code.

    ``read_again`` reads and checks it anew for a reload; it may take its time.
    """
    if checked.configuration is None:
        raise ValueError("a configuration with mistakes")
    filters = _build_filters()
    notify = Notifier()
    passed = passed_listeners(passed_sockets())
    try:
        configuration = checked.configuration
        addresses = [table.address for table in configuration.listen]
        listeners = listen(addresses, configuration.limits.keepalive, passed)
    except CannotListen as error:
        print(f"titus-py: {error}", file=sys.stderr)
        notify(status=f"not started: {error}")
        return 1
    _withdraw()
    settings = checked.configuration.log
    log = Log(settings.format, least=settings.level)
    return _Supervisor(read_again, filters, passed, listeners, log, notify).run(checked)


def take_over(legacy: Legacy, read_again: Callable[[], Checked]) -> int:
    """Go on where the program that this process ran before has left off; returns the exit code.

    The configuration is read by ``read_again`` and taken as in a reload: until it serves, and
    where it cannot, what was served before is.
    """
    passed, listeners = {}, {}
    for left in legacy.listeners:
        listener = socket.socket(fileno=left.descriptor)
        if left.passed:
            passed[left.address] = listener
        if left.listening:
            listeners[left.address] = listener
    filters = _build_filters()
    _withdraw()
    log = Log(legacy.log_format, least=legacy.log_level, lost=legacy.log_lines_lost)
    return _Supervisor(read_again, filters, passed, listeners, log, Notifier()).run(legacy)


def _build_filters() -> dict[str, str]:
    return {
        "handshake": seccomp.build(HANDSHAKE).hex(),
        "established": seccomp.build(ESTABLISHED).hex(),
        "keyd": seccomp.build(SERVING).hex(),
    }


def _withdraw() -> None:
    """Before there is a second thread: capabilities are each thread's own."""
    # With its options: which of several instances it is.
    set_title("titus-py", "titus-py: supervisor", *sys.argv[1:])
    forbid_core_dumps()
    hide_memory()
    allow_many_descriptors()
    # Whatever process 1 is, and whenever it would take note of orphans: their uids are ours.
    prctl.set_child_subreaper(True)
    keep_capabilities(SUPERVISOR_CAPABILITIES)


class _NoUids(Exception):
    """There are none for another generation's workers; the text says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"worker.uids: {reason}")


class _Supervisor:
    def __init__(
        self,
        read_again: Callable[[], Checked],
        filters: Mapping[str, str],
        passed: dict[IPAddress, socket.socket],
        listeners: dict[IPAddress, socket.socket],
        log: Log,
        notify: Notifier,
    ) -> None:
        self._read_again = read_again
        self._filters = filters
        #: Those that the service manager gave us: never closed, and used again if need be.
        self._passed = passed
        self._listeners = listeners
        self._log = log
        self._metrics = Metrics()
        self._metrics_server: MetricsServer | None = None
        self._metrics_address: IPAddress | UnixAddress | None = None
        self._notify = notify
        self._loop = EventLoop()
        self._control: Control | None = None
        self._audits = AnnouncedAudits()
        #: The last one is the one that serves, or is about to.
        self._generations: list[Generation] = []
        #: Uids that earlier parents' workers may still have.
        self._used_uids: list[range] = []
        self._addresses: dict[Address, tuple[ResolvedAddress, ...]] = {}
        self._resolver = Resolver(self._loop, self._take_addresses)
        self._version = version("titus-py")
        self._started_at, self._begun = datetime.now(UTC), time.monotonic()
        self._reloading = False
        #: The reload that goes on is none: it replaces a generation by another of the same.
        self._renewing = False
        self._reload_asked_again = False
        #: The next reload is to begin with the program.
        self._program_asked = False
        #: The generation that the reload is to end with, once it has been started.
        self._awaited: Generation | None = None
        #: Who waits for the outcome of a reload.
        self._reload_answers: list[Answer] = []
        #: Of the one after that.
        self._later_answers: list[Answer] = []
        #: When the children were last looked after.
        self._looked = time.monotonic()
        self._held_uids = HeldUids()
        self._failures: deque[float] = deque(maxlen=_FAILURES)
        self._stops = 0
        self._exit_code: int | None = None

    # --- life -------------------------------------------------------------------

    def run(self, first: Checked | Legacy) -> int:
        self._hear_signals()
        try:
            if isinstance(first, Checked):
                self._begin(first)
            else:
                self._go_on(first)
        except OSError as error:
            self._event("start_failed", level="error", reason=str(error))
            self._finish(1)
        except Held as error:
            self._event("start_failed", level="error", reason=f"worker.uids: {error}")
            self._finish(2)
        else:
            self._look_after_children()
            self._feed_watchdog()
            self._look_at_files()
        while self._exit_code is None:
            self._loop.run_once()
        # As Python ends, it gives signals back what they do by default: another one would kill.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self._control is not None:
            self._control.close()
        self._event("stop", code=self._exit_code)
        self._log.close()
        return self._exit_code

    def _begin(self, checked: Checked) -> None:
        """Start the first generation. Raises OSError, Held."""
        self._listen_for_control()
        generation = self._prepare(checked)
        self._event("start", pid=os.getpid(), vhosts=len(generation.configuration.vhost))
        self._generations.append(generation)
        self._adopt(generation)
        self._start(generation)

    def _listen_for_control(self, listener: socket.socket | None = None) -> None:
        handlers: dict[str, Callable[[Answer], None]] = {
            "status": self._answer_status,
            "reload": self._answer_reload,
            "reload program": partial(self._answer_reload, program=True),
            "audit": self._answer_audit,
        }
        try:
            self._control = Control(self._loop, handlers, listener)
        except OSError as error:
            self._event("no_control_socket", level="warning", reason=str(error))

    def _hear_signals(self) -> None:
        """Signals end the loop's wait by octets on a socket (signal.set_wakeup_fd)."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._wakeup = ours, theirs
        # The socket only wakes: of many signals at once, it does not take an octet for each.
        noted: deque[int] = deque()

        def hear() -> None:
            with suppress(BlockingIOError):
                while ours.recv(4096):
                    continue
            while noted:
                number = noted.popleft()
                if number == signal.SIGHUP:
                    self._reload()
                else:
                    self._stop(signal.Signals(number).name)

        for number in _SIGNALS:
            signal.signal(number, lambda number, _: noted.append(number))
        self._loop.watch(ours.fileno(), hear)
        # Those that came while the program was exchanged have waited.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _stop(self, reason: str) -> None:
        """Once: let connections end. Twice: end them."""
        self._stops += 1
        self._close_listeners(self._listeners.copy())
        drain = self._serving.configuration.worker.drain
        # A drain may take longer than the service manager has patience.
        microseconds = int((drain + 2 * _STOP_SECONDS) * 1_000_000)
        self._notify(stopping=1, extend_timeout_usec=microseconds)
        if self._stops == 1:
            self._event("stopping", reason=reason, drain=drain)
            order: dict[str, object] = {"do": "drain", "seconds": drain}
        else:
            self._event("stopping_at_once", level="warning", reason=reason)
            order, drain = {"do": "close"}, 0.0
        for parent in self._parents():
            self._order(parent, order)
            self._loop.after(drain + _STOP_SECONDS, parent.kill)
        if not self._parents():
            self._finish(0)

    def _finish(self, code: int) -> None:
        """Leave nothing behind, and leave."""
        for generation in self._generations:
            for child in generation.children:
                child.kill()
            for child in generation.children:
                self._let_go(generation, child)
        self._exit_code = code

    @property
    def _serving(self) -> Generation:
        return self._generations[-1]

    def _parents(self) -> list[Child]:
        return [
            generation.parent for generation in self._generations if generation.parent is not None
        ]

    # --- generations ------------------------------------------------------------

    def _prepare(self, checked: Checked) -> Generation:
        """A generation that has not been started. Raises OSError, Held."""
        if checked.configuration is not None:
            self._hold_uids(checked.configuration, checked.path)
        number = self._generations[-1].number + 1 if self._generations else 1
        generation = Generation(number, checked, self._filters)
        _prepare_chroot(generation.configuration.worker.chroot)
        for warning in checked.warnings:
            self._event("configuration", level="warning", problem=str(warning))
        return generation

    def _hold_uids(self, configuration: Configuration, path: str) -> None:
        """Keep other instances from these uids, from now on until we end. Raises Held."""
        keyd = configuration.keyd
        try:
            self._held_uids.hold(
                configuration.worker.uids, None if keyd.socket else keyd.user.uid, path
            )
        except OSError as error:
            self._event("uids_not_held", level="warning", reason=error.strerror)

    def _adopt(self, generation: Generation) -> None:
        """Go by its configuration in what is the supervisor's own. Raises OSError, and then not."""
        self._serve_metrics(generation.configuration.metrics.address)
        wanted = [table.address for table in generation.configuration.listen]
        for address in unwanted(self._passed, wanted):
            self._event("not_accepted", level="warning", address=str(address))
        log = generation.configuration.log
        self._log.form, self._log.least = log.format, log.level
        generation.unresolved = {
            vhost.backend
            for vhost in generation.configuration.vhost
            if isinstance(vhost.backend, NameAddress) and vhost.backend not in self._addresses
        }
        self._loop.after(_NAMES_SECONDS, lambda: self._stop_waiting_for_names(generation))
        self._resolve()

    def _resolve(self) -> None:
        """Look up the backends of all generations, and no others."""
        backends = {
            vhost.backend
            for generation in self._generations
            for vhost in generation.configuration.vhost
        }
        names = [backend for backend in backends if isinstance(backend, NameAddress)]
        for backend in backends:
            if isinstance(backend, NameAddress):
                continue
            # Known without looking it up, and so before any parent is started.
            try:
                self._addresses[backend] = numeric(backend)
            except OSError as error:
                self._unresolved(backend, error.strerror)
        self._resolver.resolve(names)

    def _start(self, generation: Generation) -> None:
        """Start its keyd and its parent, as soon as there are uids for the workers."""
        if self._stops or generation not in self._generations or generation.retired:
            return
        uids = self._free_uids(generation)
        if uids is None:
            # Its own last parent's workers are still ending.
            self._loop.after(_RETRY_SECONDS, lambda: self._start(generation))
            return
        try:
            control = None
            if generation.configuration.keyd.socket is None:
                control = generation.start_keyd()
                self._watch(generation, generation.keyd)
            listeners = [
                listener.fileno() for listener in self._wanted_listeners(generation).values()
            ]
            generation.start_parent(control, uids, listeners, self._addresses)
            self._watch(generation, generation.parent)
            if generation.configuration.keyd.socket is not None:
                self._connect_keyd(generation, generation.configuration.keyd.socket)
                if generation is self._awaited and not self._renewing:
                    patience = _START_SECONDS + len(generation.certificates)
                    self._loop.after(patience, lambda: self._abandon_keyless(generation))
        except OSError as error:
            self._event("start_failed", level="error", reason=error.strerror)
            if generation is self._awaited and not generation.announced:
                self._abandon(generation)
                return
            if generation.parent is None:
                generation.uids = range(0)
            self._fail(f"start: {error.strerror}")
            self._loop.after(_RETRY_SECONDS, lambda: self._start(generation))

    def _start_keyd_again(self, generation: Generation) -> None:
        if self._stops or generation.retired or generation.parent is None or generation.keyd:
            return
        try:
            with generation.start_keyd() as control:
                self._watch(generation, generation.keyd)
                self._order(generation.parent, {"do": "use keyd"}, [control.fileno()])
        except OSError as error:
            self._event("start_failed", level="error", reason=error.strerror)
            self._fail(f"start of keyd: {error.strerror}")
            self._loop.after(_RETRY_SECONDS, lambda: self._start_keyd_again(generation))

    def _connect_keyd(self, generation: Generation, path: Path) -> None:
        """Reach a keyd that somebody else started; again and again, until it is there."""
        parent = generation.parent
        if self._stops or generation.retired or parent is None:
            return
        try:
            control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        except OSError:
            self._loop.after(_KEYD_SECONDS, lambda: self._connect_keyd(generation, path))
            return

        def again(reason: str) -> None:
            control.close()
            if not (generation.keyd_missed or generation.retired or generation.parent is None):
                generation.keyd_missed = reason
                self._event("keyd_unreachable", level="error", socket=str(path), reason=reason)
                self._notify(status=self._status_text())
            self._loop.after(_KEYD_SECONDS, lambda: self._connect_keyd(generation, path))

        def stop_waiting() -> None:
            self._loop.unwatch(control.fileno())
            again(f"it has not said within {_QUIET_SECONDS:g} s which keys it has")

        def hear_keys() -> None:
            patience.cancel()
            self._loop.unwatch(control.fileno())
            try:
                introduction = control.recv(MAX_KEYS_OCTETS)
                if not introduction:
                    again("it hung up without a word")
                    return
                keys = {key.hex() for key in Keys.decode(introduction).keys}
            except OSError as error:
                again(error.strerror or str(error))
                return
            except Malformed as error:
                again(f"it does not speak as keyd does: {error}")
                return
            before, generation.keyds_keys = generation.keyds_keys, keys
            missing = generation.key_ids - keys
            if missing and generation is self._awaited and not self._renewing:
                control.close()
                self._abandon(generation, _lacks(generation, missing))
                return
            if missing and before not in (None, keys):
                # There may be certificates to them already. Until those serve, nobody is to be
                # given a certificate whose key is gone: new clients wait.
                control.close()
                generation.keyd_held = True
                if generation is self._serving:
                    self._reload_for_keys()
                return
            for one in missing:
                self._event("keyd_lacks_key", level="error", socket=str(path), key=one)
            try:
                self._order(parent, {"do": "use keyd"}, [control.fileno()])
            except OSError as error:
                again(error.strerror or str(error))
                return
            control.close()
            self._event("keyd_connected", socket=str(path), generation=generation.number)
            generation.without_keyd = generation.waits_for_keyd = False
            generation.keyd_missed = ""
            if generation.ready:
                self._ready(generation)
            if before not in (None, keys) and generation is self._serving:
                self._reload_for_keys()

        try:
            control.connect(str(path))
        except OSError as error:
            again(error.strerror or str(error))
        else:
            patience = self._loop.after(_QUIET_SECONDS, stop_waiting)
            self._loop.watch(control.fileno(), hear_keys)

    def _free_uids(self, generation: Generation) -> range | None:
        taken = [*self._used_uids, *(other.uids for other in self._generations if other.uids)]
        return free_block(generation.configuration.worker.uids, generation.uids_needed, taken)

    def _see_that_uids_are_free(self, generation: Generation) -> None:
        """For a generation that is to be started beside others. Raises _NoUids."""
        range_of_all, needed = generation.configuration.worker.uids, generation.uids_needed
        uids = self._free_uids(generation)
        if uids is None and free_block(range_of_all, needed, [self._serving.uids]):
            raise _NoUids(
                "connections of earlier generations still have too many of them: "
                "widen the range, or wait for those connections to end"
            )
        if uids is None:
            raise _NoUids(
                f"max + spare = {needed} workers find no room in the range beside those that "
                "serve: widen it, or set one apart from the former"
            )
        # No process of ours has one of these: they are given back when none has.
        if (uid := process_with(uids)) is not None:
            raise _NoUids(f"{uid} is the uid of a process that is not of this instance")

    def _release_uids(self, uids: range, pause: float = _RETRY_SECONDS) -> None:
        """Give uids back, once no process can have them any more.

        Soon, since a new parent may wait for them; but it takes a look at all processes.
        """
        _reap_orphans()
        if any_process_has(uids):
            longer = min(2 * pause, _UIDS_SECONDS)
            self._loop.after(pause, lambda: self._release_uids(uids, longer))
        else:
            self._used_uids.remove(uids)
            # Its fork server has no uid of these, and may end a little later.
            self._loop.after(_ORPHANS_SECONDS, _reap_orphans)

    def _ready(self, generation: Generation) -> None:
        """Both of its processes serve."""
        if generation.parent is not None and not generation.retired:
            # Not before: whom it has accepted is lost with a generation that is abandoned.
            # Not sooner: until now, another generation accepted on them.
            for listener in self._wanted_listeners(generation).values():
                keep_alive(listener, generation.configuration.limits.keepalive)
            self._order(generation.parent, {"do": "accept"})
        if generation is not self._serving or self._stops:
            return
        if not generation.announced:
            generation.announced = True
            for address in self._listeners:
                self._event("listening", address=str(address), generation=generation.number)
            self._retire_all_but(generation)
        if not self._reloading:
            self._notify(ready=1, status=self._status_text())

    def _fail(self, why: str) -> None:
        """Count a failure, and give up where there have been too many."""
        now = time.monotonic()
        self._failures.append(now)
        if len(self._failures) == _FAILURES and now - self._failures[0] < _FAILURES_SECONDS:
            reason = f"{_FAILURES} failures within {_FAILURES_SECONDS:g} s: see the lines above"
            self._event("giving_up", level="alarm", reason=reason)
            self._notify(status=f"gave up: {why}")
            self._finish(1)

    # --- reload -----------------------------------------------------------------

    def _reload(self, program: bool = False) -> None:
        """Read the configuration anew, off this thread; the rest is ``_take_reread``'s.

        Where the program is to be exchanged first, that is what the next one does.
        """
        if self._stops:
            return
        self._program_asked = self._program_asked or program
        if self._reloading:
            self._reload_asked_again = True
            if self._renewing and self._awaited is not None and self._awaited.waits_for_keyd:
                # It may say where keyd is: better than more of the same.
                self._renewing = False
                self._abandon_keyless(self._awaited)
            return
        program, self._program_asked = self._program_asked, False
        self._reloading = True
        self._event("reloading")
        self._notify.reloading()
        if program:
            legacy, environment = self._legacy(), dict(os.environ)
            self._aside(
                lambda: succession.try_out(legacy, environment, _READ_SECONDS), self._take_program
            )
        else:
            self._aside(self._read_again, self._take_reread)

    def _aside(self, work: Callable[[], _Found], take: Callable[[_Found], None]) -> None:
        """What takes its time, in a thread; and then, in this one, what comes of it.

        The reload that it is a part of fails where nothing does.
        """
        try:
            ours, theirs = os.pipe2(os.O_CLOEXEC)
        except OSError as error:
            self._reload_failed([f"it could not be read: {error.strerror}"])
            return
        found: list[_Found] = []

        def run() -> None:
            try:
                found.append(work())
            finally:
                os.close(theirs)

        def done() -> None:
            too_late.cancel()
            self._loop.unwatch(ours)
            os.close(ours)
            if found:
                take(found[0])
            else:
                self._reload_failed(["it could not be read: see the lines above"])

        def give_up() -> None:
            self._loop.unwatch(ours)
            os.close(ours)
            self._reload_failed([f"it could not be read within {_READ_SECONDS:g} s"])

        too_late = self._loop.after(_READ_SECONDS, give_up)
        self._loop.watch(ours, done)
        try:
            threading.Thread(target=run, daemon=True).start()
        except RuntimeError as error:  # of processes, there are as many as there may be
            self._event("start_failed", level="error", reason=str(error))
            os.close(theirs)

    def _reload_for_keys(self) -> None:
        """keyd was started again, and its keys are not what they were: nor may certificates be."""
        self._event("keys_changed", level="warning", action="reloading")
        self._reload()

    def _take_reread(self, checked: Checked) -> None:
        """A good configuration takes over; a bad one changes nothing."""
        if self._stops:
            return
        if checked.configuration is None:
            self._reload_failed([str(mistake) for mistake in checked.mistakes])
            return
        wanted = [table.address for table in checked.configuration.listen]
        try:
            generation = self._prepare(checked)
            self._see_that_uids_are_free(generation)
            added = listen(
                (address for address in wanted if address not in self._listeners),
                checked.configuration.limits.keepalive,
                self._passed,
                self._listeners,
            )
        except (CannotListen, OSError, Held, _NoUids) as error:
            self._reload_failed([str(error)])
            return
        self._generations.append(generation)
        try:
            self._adopt(generation)
        except OSError as error:
            self._close_listeners(added)
            self._forget(generation)
            self._reload_failed([str(error)])
            return
        self._listeners |= added
        generation.added = added
        self._awaited = generation
        self._start(generation)

    # --- another program --------------------------------------------------------

    def _environment(self) -> dict[str, str]:
        """What this program was started with."""
        return {**os.environ, **self._notify.environment}

    def _legacy(self) -> Legacy:
        """All that the next program needs to go on from here."""
        known = self._passed | self._listeners
        return Legacy(
            generations=[succession.leave(generation) for generation in self._generations],
            listeners=[
                succession.Listener(
                    address=address,
                    descriptor=listener.fileno(),
                    passed=address in self._passed,
                    listening=address in self._listeners,
                )
                for address, listener in known.items()
            ],
            held_uids=self._held_uids.descriptor,
            used_uids=[(uids.start, uids.stop) for uids in self._used_uids],
            addresses=[
                (str(backend), [list(address) for address in addresses])
                for backend, addresses in self._addresses.items()
            ],
            control=self._control.listener.fileno() if self._control else None,
            answers=[answer.client.fileno() for answer in self._reload_answers],
            later_answers=[answer.client.fileno() for answer in self._later_answers],
            asked_again=self._reload_asked_again,
            program_asked=self._program_asked,
            metrics=self._metrics_server.listener.fileno() if self._metrics_server else None,
            metrics_address=self._metrics_address,
            counts=self._metrics.leave(),
            log_format=self._log.form,
            log_level=self._log.least,
            log_lines_lost=self._log.lost,
            started=self._started_at,
            begun=self._begun,
        )

    def _take_program(self, problems: list[str]) -> None:
        """It has understood all: be that program. Or else go on as this one."""
        if self._stops:
            return
        if problems:
            self._reload_failed(problems)
            return
        if not all(child.has_heard_all for one in self._generations for child in one.children):
            # Nobody else could tell them what they have not taken yet.
            self._loop.after(_RETRY_SECONDS, lambda: self._take_program([]))
            return
        self._log.close()
        try:
            succession.execute(self._legacy(), self._environment(), _SIGNALS)
        except OSError as error:
            self._log = Log(self._log.form, least=self._log.least, lost=self._log.lost)
            self._reload_failed([f"{sys.executable}: {error.strerror}"])

    def _go_on(self, legacy: Legacy) -> None:
        """As the next program: take up everything, and go on with the reload that this is."""
        self._started_at, self._begun = legacy.started, legacy.begun
        self._metrics.inherit(legacy.counts)
        self._listen_for_control(
            None if legacy.control is None else socket.socket(fileno=legacy.control)
        )
        if self._control is not None:
            for answers, clients in (
                (self._reload_answers, legacy.answers),
                (self._later_answers, legacy.later_answers),
            ):
                answers += [self._control.adopt(socket.socket(fileno=one)) for one in clients]
        self._reload_asked_again = legacy.asked_again
        self._program_asked = legacy.program_asked
        self._addresses = {
            parse_backend(backend): resolved(addresses) for backend, addresses in legacy.addresses
        }
        self._generations = [succession.inherit(left, self._filters) for left in legacy.generations]
        self._held_uids = HeldUids(legacy.held_uids)
        for generation in self._generations:
            for child in generation.children:
                self._watch(generation, child)
        if legacy.metrics is not None:
            self._metrics_server = self._make_metrics_server(socket.socket(fileno=legacy.metrics))
            self._metrics_address = legacy.metrics_address
        self._resolve()
        for first, beyond in legacy.used_uids:
            self._used_uids.append(range(first, beyond))
            self._release_uids(self._used_uids[-1])
        serving = self._serving
        self._event(
            "program_changed",
            pid=os.getpid(),
            version=self._version,
            generation=serving.number,
        )
        self._reloading = True
        self._bring_up(serving)
        self._aside(self._read_again, self._take_reread)

    def _bring_up(self, generation: Generation) -> None:
        """What the program before was about to start, of the generation that serves."""
        path = generation.configuration.keyd.socket
        if generation.parent is None:
            self._start(generation)
        elif path is None and generation.keyd is None:
            self._start_keyd_again(generation)
        elif path is not None and generation.without_keyd:
            self._connect_keyd(generation, path)
        elif generation.ready:
            self._ready(generation)

    # --- a fork server that has ended -------------------------------------------

    def _fork_server_died(self, generation: Generation) -> None:
        if generation.crippled and not generation.retired and not self._stops:
            self._fail("the fork server died")
            if self._exit_code is None:
                self._renew(generation)

    def _renew(self, generation: Generation) -> None:
        """Replace a generation that can make no more workers by another of the same.

        Its connections go on, as in a reload; where there can be no other, they end, and it is
        started anew. A reload that goes on may replace it as well: if it does not, it is
        followed by this (``_reload_ended``).
        """
        if not generation.crippled or generation.retired or self._stops:
            return
        if not self._reloading:
            self._reloading = self._renewing = True
            self._take_reread(generation.checked)
        else:
            parent = generation.parent
            self._loop.after(_START_SECONDS, lambda: self._end_crippled(generation, parent))

    def _end_crippled(self, generation: Generation, parent: Child | None) -> None:
        """Nothing has replaced it: end its parent, whose end is followed by a new start."""
        crippled = generation.crippled and not generation.retired
        if self._stops or self._renewing or not crippled:
            return
        if parent is not None and parent is generation.parent:
            parent.kill()

    def _reload_failed(self, problems: list[str]) -> None:
        if self._stops:
            return
        for problem in problems:
            self._event("reload_failed", level="error", problem=problem)
        self._reload_ended({"reloaded": False, "problems": problems})

    def _reload_ended(self, outcome: dict[str, object]) -> None:
        self._reloading = False
        self._awaited = None
        serving = self._serving
        if self._renewing:
            self._renewing = False
            self._end_crippled(serving, serving.parent)
        else:
            self._loop.after(0, lambda: self._renew(serving))
        self._notify(ready=1, status=self._status_text())
        for answer in self._reload_answers:
            answer(outcome)
        self._reload_answers, self._later_answers = self._later_answers, []
        if self._reload_asked_again:
            self._reload_asked_again = False
            self._reload()
        elif serving.keyd_held and serving.configuration.keyd.socket is not None:
            # There are no certificates to its keys: then those that it can serve.
            serving.keyd_held = False
            self._connect_keyd(serving, serving.configuration.keyd.socket)

    def _retire_all_but(self, generation: Generation) -> None:
        """Leave all new connections to this generation; the others serve what they have."""
        for other in self._generations.copy():
            if other is not generation and not other.retired:
                other.retired = True
                if other.parent is None:
                    self._end(other)
                else:
                    other.retiring = True
                    self._order(other.parent, {"do": "retire"})
        self._close_listeners(self._unwanted_listeners())
        self._check_handed_over()

    def _check_handed_over(self) -> None:
        """A reload is done when nobody but the new generation takes connections."""
        awaited = self._awaited
        if awaited is None or not awaited.announced:
            return
        if not any(generation.retiring for generation in self._generations):
            self._event("reloaded", generation=awaited.number)
            self._reload_ended({"reloaded": True, "generation": awaited.number})

    def _abandon_keyless(self, generation: Generation) -> None:
        """It was to have its keys from a keyd that has not been there all this time."""
        if generation is self._awaited and generation.waits_for_keyd and not self._stops:
            path = generation.configuration.keyd.socket
            self._abandon(
                generation, f"keyd.socket: {path}: no keyd is there, or none that answers"
            )

    def _abandon(
        self,
        generation: Generation,
        why: str = "keyd or the parent did not start: see the lines above",
    ) -> None:
        """A new generation could not be started: the one before goes on serving."""
        self._end(generation)
        # Also where one that serves is wider: its clients would come to this one, unheard.
        self._close_listeners(generation.added)
        try:
            self._adopt(self._serving)
        except OSError as error:
            self._event("start_failed", level="error", reason=str(error))
        self._reload_failed([why])
        if self._serving.ready:
            self._ready(self._serving)

    def _wanted_listeners(self, generation: Generation) -> dict[IPAddress, socket.socket]:
        """Those on its addresses, not those that only an earlier generation wants.

        One within a wider address stays: to close it would reset who is in its queue.
        """
        addresses = [table.address for table in generation.configuration.listen]
        return {
            address: listener
            for address, listener in self._listeners.items()
            if any(wanted.covers(address) for wanted in addresses)
        }

    def _unwanted_listeners(self) -> dict[IPAddress, socket.socket]:
        wanted = self._wanted_listeners(self._serving)
        return {key: value for key, value in self._listeners.items() if key not in wanted}

    def _end(self, generation: Generation) -> None:
        """Of a generation that nobody needs any more: end what is left of it."""
        for child in generation.children:
            child.kill()
            self._let_go(generation, child)
        self._forget(generation)

    def _forget(self, generation: Generation) -> None:
        self._generations.remove(generation)
        self._metrics.forget(generation.number)
        self._resolve()

    def _close_listeners(self, listeners: dict[IPAddress, socket.socket]) -> None:
        for address, listener in listeners.items():
            if address not in self._passed or self._stops:
                listener.close()
            self._listeners.pop(address, None)

    # --- children ---------------------------------------------------------------

    def _watch(self, generation: Generation, child: Child | None) -> None:
        if child is None:
            return
        if child in generation.starting:
            # keyd reads and checks every key, and a passphrase may be made to cost time.
            patience = _START_SECONDS + len(generation.certificates)
            child.patience = self._loop.after(patience, child.kill)
        self._loop.watch(child.pidfd, lambda: self._bury(generation, child))
        self._loop.watch(child.socket.fileno(), lambda: self._hear(generation, child))

    def _hear(self, generation: Generation, child: Child) -> bool:
        """What a child has to say is an event for the log; returns whether there may be more."""
        for _ in range(100):
            try:
                message, reports = receive_descriptors(child.socket, _EVENT_OCTETS, 1)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                # It has ended without having heard everything. What it said is still there.
                continue
            if not message:
                self._loop.unwatch(child.socket.fileno())
                child.socket.close()
                return False
            child.last_heard = time.monotonic()
            try:
                event = json.loads(message)
                name = event.pop("event")
            except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
                # Longer than it may be, or not ours.
                self._event("unintelligible", level="alarm", process=child.name, pid=child.pid)
                child.kill()
                for report in reports:
                    os.close(report)
                continue
            for report in reports:
                name = complete_record(event, read_report(report))
                os.close(report)
            if name == "connection_over" and not reports:
                # There was no descriptor left for the report.
                name = "connection_ended"
                event["end"] = event["end"] or "not known: no descriptor for its report"
            if name == "ready":
                self._started(generation, child, event)
            else:
                self._record(generation, name, event)
        return True

    def _record(self, generation: Generation, name: str, event: dict[str, Any]) -> None:
        """Log what a child said, and keep count of the connections that there are."""
        if name == "alive":
            generation.spares = event.get("spares", generation.spares)
        elif name == "retired":
            generation.retiring = False
            self._check_handed_over()
        elif name == "connection_begun":
            generation.connections[event["connection"]] = event
        elif name in _ENDS:
            generation.ended.append(generation.connections.pop(event["connection"], {}))
        elif name == "keyd_refused" and self._audits.expect(event.get("connection")):
            name, event["level"] = "audit_refused", "info"
        elif name == "keyd_refused":
            _complete_refusal(generation, event)
        elif name == "keyd_lost" and generation.configuration.keyd.socket is not None:
            generation.without_keyd = True
            self._connect_keyd(generation, generation.configuration.keyd.socket)
        self._event(name, generation.number, **event)
        if name == "fork_server_died":
            generation.crippled = True
            # Not now: it may be the end of everything, and the child is being heard.
            self._loop.after(0, lambda: self._fork_server_died(generation))

    def _event(self, name: str, of_generation: int = 0, **fields: Any) -> None:
        """Something to count and, if it is of interest to a reader, to log."""
        self._metrics.record(name, {"level": "info", **fields}, of_generation)
        if name not in _NOT_FOR_THE_LOG:
            self._log(name, **fields)

    def _record_lost(self, generation: Generation) -> None:
        """A parent has ended, and with it the connections whose end it did not tell."""
        lost, generation.connections = generation.connections, {}
        for begun in lost.values():
            self._event("connection_ended", **begun, end="the parent ended")

    def _started(self, generation: Generation, child: Child, event: dict[str, Any]) -> None:
        if child.patience is not None:
            child.patience.cancel()
        keys = event.pop("keys", None)
        self._event(
            f"{child.name}_started",
            generation.number,
            pid=child.pid,
            generation=generation.number,
            **event,
        )
        if keys is not None and keys != fingerprint(map(bytes.fromhex, generation.key_ids)):
            self._reload_for_keys()
        generation.starting.discard(child)
        if generation.ready:
            self._ready(generation)

    def _bury(self, generation: Generation, child: Child) -> None:
        """A child has ended: as it was told to, or not."""
        while child.socket.fileno() >= 0 and self._hear(generation, child):
            continue
        how = self._let_go(generation, child)
        # keyd leaves when its parent has: that end is about to be heard of.
        hung_up = child.name == "keyd" and how == "exited with 0"
        if not (self._stops or generation.retired or hung_up) or how != "exited with 0":
            self._event(
                f"{child.name}_died",
                level="alarm",
                pid=child.pid,
                generation=generation.number,
                how=how,
            )
        if self._stops:
            if not self._parents():
                self._finish(0)
        elif generation.retired:
            if generation.parent is None:
                self._end(generation)
                self._check_handed_over()
        elif generation is self._awaited and not generation.announced:
            self._abandon(generation)
        elif hung_up:
            self._loop.after(_RETRY_SECONDS, lambda: self._start_keyd_again(generation))
        else:
            self._restart(generation, child, how)

    def _restart(self, generation: Generation, child: Child, how: str) -> None:
        self._fail(f"{child.name} {how}")
        if self._exit_code is not None:
            return
        if child.name == "keyd":
            self._start_keyd_again(generation)
            return
        # A new parent starts with a new keyd.
        for keyd in generation.children:
            keyd.kill()
            self._let_go(generation, keyd)
        self._start(generation)

    def _order(
        self, child: Child, order: Mapping[str, object], descriptors: Sequence[int] = ()
    ) -> None:
        """Tell a child something: now, or as soon as it has heard what it was told before."""
        if child.queue(order, descriptors):
            self._send_orders(child)

    def _send_orders(self, child: Child) -> None:
        if not child.send_orders():
            self._loop.after(_RETRY_SECONDS, lambda: self._send_orders(child))

    def _let_go(self, generation: Generation, child: Child) -> str:
        """Of a child that has ended, or is about to; returns how."""
        if child.patience is not None:
            child.patience.cancel()
        self._loop.unwatch(child.pidfd)
        if child.socket.fileno() >= 0:
            self._loop.unwatch(child.socket.fileno())
        generation.starting.discard(child)
        if child is generation.keyd:
            generation.keyd = None
        elif child is generation.parent:
            generation.parent = None
            generation.crippled = False
            self._record_lost(generation)
            uids, generation.uids = generation.uids, range(0)
            self._used_uids.append(uids)
            self._loop.after(0, lambda: self._release_uids(uids))
        return child.bury()

    def _serve_metrics(self, address: IPAddress | UnixAddress | None) -> None:
        """Have the numbers there, and nowhere else. Raises OSError."""
        if address == self._metrics_address:
            return
        try:
            listener = listen_at(address) if address is not None else None
        except OSError as error:
            raise OSError(f"metrics.address: {address}: {error.strerror or error}") from None
        if self._metrics_server is not None:
            self._metrics_server.close()
            self._metrics_server = None
        if listener is not None:
            self._metrics_server = self._make_metrics_server(listener)
        self._metrics_address = address

    def _make_metrics_server(self, listener: socket.socket) -> MetricsServer:
        return MetricsServer(
            self._loop, listener, lambda: exposition(self._metrics, self._status())
        )

    # --- being looked after, and looking after ----------------------------------

    def _look_after_children(self) -> None:
        """End a child that has gone quiet: its successor will serve."""
        now = time.monotonic()
        # Who has not been running (SIGSTOP, a virtual machine that was paused) cannot tell.
        was_away = now - self._looked > 2 * ALIVE_SECONDS
        self._looked = now
        for generation in self._generations:
            for child in generation.children:
                if was_away:
                    child.last_heard = now
                if child not in generation.starting and now - child.last_heard > _QUIET_SECONDS:
                    self._event(f"{child.name}_hangs", level="alarm", pid=child.pid)
                    child.kill()
        self._notify(status=self._status_text())
        self._loop.after(ALIVE_SECONDS, self._look_after_children)

    def _look_at_files(self) -> None:
        """Reload where a certificate or key is not what it was."""
        serving = self._serving
        if serving.configuration.service.reload_on_change and serving.files.settled_change():
            self._event("files_changed", action="reloading")
            self._reload()
        self._loop.after(_FILES_SECONDS, self._look_at_files)

    def _feed_watchdog(self) -> None:
        if self._notify.watchdog is not None:
            self._notify(watchdog=1)
            self._loop.after(self._notify.watchdog, self._feed_watchdog)

    def _status_text(self) -> str:
        """One line, for ``systemctl status``."""
        if self._stops:
            return "stopping"
        waits = self._waits_for()
        connections = sum(len(generation.connections) for generation in self._generations)
        counts = self._metrics.counts()
        return (
            f"{connections} connections now, {counts['accepted']} so far; "
            f"generation {self._serving.number}" + (f"; waits for {waits}" if waits else "")
        )

    def _waits_for(self) -> str:
        """What keeps it from serving new clients, if anything does."""
        serving = self._serving
        path = serving.configuration.keyd.socket
        if path is not None and serving.without_keyd:
            reason = f": {serving.keyd_missed}" if serving.keyd_missed else ""
            return f"keyd at {path}{reason}"
        return " and ".join(sorted(child.name for child in serving.starting))

    def _answer_status(self, answer: Answer) -> None:
        answer(self._status())

    def _status(self) -> dict[str, object]:
        """What ``titus-py status`` shows, and the metrics are made of."""
        serving = self._serving
        now = datetime.now(UTC)
        credentials = list(serving.certificates)
        return {
            "version": self._version,
            "pid": os.getpid(),
            "started": self._started_at.isoformat(),
            "seconds_up": round(time.monotonic() - self._begun),
            "listeners": [str(address) for address in self._listeners],
            "generations": [
                {
                    "number": generation.number,
                    "state": generation.state,
                    "since": generation.started.isoformat(),
                    "seconds": round(time.monotonic() - generation.begun),
                    "parent": generation.parent and generation.parent.pid,
                    "keyd": generation.keyd and generation.keyd.pid,
                    "connections": len(generation.connections),
                    "spares": generation.spares,
                }
                for generation in self._generations
            ],
            "vhosts": [
                {
                    "names": vhost.sni,
                    "local_address": vhost.local_address,
                    "local_port": vhost.local_port,
                    "backend": str(vhost.backend),
                    "addresses": [
                        address_text(address)
                        for _, address in self._addresses.get(vhost.backend, ())
                    ],
                    "certificate": credentials.index(vhost.credential),
                }
                for vhost in serving.configuration.vhost
            ],
            "certificates": [
                {
                    "file": str(credential.certificate),
                    "subject": facts.subject,
                    "names": facts.names,
                    "not_after": facts.not_after.isoformat(),
                    "days_left": (facts.not_after - now).days,
                }
                for credential, facts in serving.certificates.items()
            ],
            "max_connections": serving.configuration.worker.max,
            "log_lines_lost": self._log.lost,
            "counts": self._metrics.counts(),
        }

    def _answer_reload(self, answer: Answer, program: bool = False) -> None:
        if self._stops:
            answer({"reloaded": False, "problems": ["it is being stopped"]})
            return
        # One that goes on may have read the files already, or none at all.
        (self._later_answers if self._reloading else self._reload_answers).append(answer)
        self._reload(program)

    def _answer_audit(self, answer: Answer) -> None:
        connection = self._audits.announce()
        self._event("audit_announced", connection=connection)
        answer({"connection": connection})

    # --- backends ---------------------------------------------------------------

    def _take_addresses(self, backend: NameAddress, found: Addresses | OSError) -> None:
        """Pass on where a backend is now; an old answer is better than none."""
        if isinstance(found, OSError):
            self._unresolved(backend, found.strerror)
        elif self._addresses.get(backend) != found:
            self._pass_on_addresses(backend, found)
        self._stop_waiting_for(backend)

    def _unresolved(self, backend: Address, reason: str | None) -> None:
        kept = len(self._addresses.get(backend, ()))
        self._event(
            "backend_unresolved", level="error", backend=str(backend), reason=reason, kept=kept
        )

    def _stop_waiting_for(self, backend: NameAddress) -> None:
        """A generation that is ready but for this name may serve now."""
        for generation in self._generations.copy():
            if backend in generation.unresolved:
                generation.unresolved.remove(backend)
                if generation.ready:
                    self._ready(generation)

    def _stop_waiting_for_names(self, generation: Generation) -> None:
        """Name servers have had their time: serve without, as soon as they answer with."""
        for backend in list(generation.unresolved):
            self._unresolved(backend, f"no answer within {_NAMES_SECONDS:g} s")
            self._stop_waiting_for(backend)

    def _pass_on_addresses(self, backend: NameAddress, found: Addresses) -> None:
        self._addresses[backend] = found
        for generation in self._generations:
            numbers = [
                number
                for number, vhost in enumerate(generation.configuration.vhost)
                if vhost.backend == backend
            ]
            for first in range(0, len(numbers), _ORDER_VHOSTS):
                if generation.parent is not None:
                    vhosts = numbers[first : first + _ORDER_VHOSTS]
                    order = {"do": "use backend", "vhosts": vhosts, "addresses": found}
                    self._order(generation.parent, order)


def _lacks(generation: Generation, missing: set[str]) -> str:
    """Why keyd, a service of its own, cannot serve this generation, and what to do."""
    files = [
        str(credential.certificate)
        for credential, facts in generation.certificates.items()
        if facts.key_id.hex() in missing
    ]
    return (
        f"keyd.socket: the keyd at {generation.configuration.keyd.socket} has not the key of "
        f"{', '.join(files)}: have it read its keys again (systemctl restart titus-keyd)"
    )


def _complete_refusal(generation: Generation, event: dict[str, Any]) -> None:
    """Add whose request it was: a worker may have ended before keyd came to it."""
    connection = event["connection"]
    for begun in (generation.connections.get(connection, {}), *reversed(generation.ended)):
        if begun.get("connection") == connection:
            event |= {"client": begun["client"], "uid": begun["uid"]}
            return


def _reap_orphans() -> None:
    """Take note of the end of workers and fork servers whose parent has ended, and could not.

    They are of the session that the parent led. Of theirs alone: our own children, which are
    of our session or lead one, are waited for elsewhere.
    """
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT
    # Another thread may wait for a child of its own that is seen here.
    with suppress(ChildProcessError, ProcessLookupError):
        while (ended := os.waitid(os.P_ALL, 0, look)) is not None:
            if os.getsid(ended.si_pid) in (os.getsid(0), ended.si_pid):
                return
            os.waitid(os.P_PID, ended.si_pid, os.WEXITED)


def _prepare_chroot(directory: Path) -> None:
    """Make the empty directory; ``check`` has looked at one that was there already.

    Raises OSError, which names the setting.
    """
    try:
        directory.mkdir(mode=0o555, parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"worker.chroot: {directory}: {error.strerror}") from None
