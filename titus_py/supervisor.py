"""The supervisor's life: bind, start keyd and the parent, keep them running, stop them.

Runs as root, from beginning to end. It hears signals and its own children; never a
client's octet, never a private key, and it does not load OpenSSL. What its
children say is trusted with the log, and with nothing else.
"""

import json
import os
import signal
import socket
import sys
import time
from collections import deque
from pathlib import Path

import prctl

from keyd.linux import seccomp
from keyd.linux.credentials import forbid_core_dumps, hide_memory, keep_capabilities
from keyd.system_calls import SERVING
from titus_py.address import Address, IPAddress
from titus_py.check import Checked
from titus_py.configuration import Configuration
from titus_py.confinement import PARENT_CAPABILITIES
from titus_py.dialer import ResolvedAddress, reset_at_close
from titus_py.event_loop import EventLoop, Timer
from titus_py.generation import Child, start_keyd, start_parent
from titus_py.log import Log
from titus_py.plan import Plan, VirtualHost
from titus_py.resolver import Resolver
from titus_py.worker_filter import ESTABLISHED, HANDSHAKE

__all__ = ["serve"]

#: What the supervisor keeps, for itself or for what it starts, and what for.
SUPERVISOR_CAPABILITIES = {
    **PARENT_CAPABILITIES,
    prctl.CAP_DAC_OVERRIDE: "keyd reads keys, the parent connects to unix sockets, of any owner",
    prctl.CAP_IPC_LOCK: "keyd locks its memory",
    prctl.CAP_SYS_RESOURCE: "keyd may lock as much of it as it takes",
}
_BACKLOG = 4096
#: So many failures of keyd or the parent within so many seconds, and the supervisor gives up.
_FAILURES, _FAILURES_SECONDS = 3, 10.0
#: How long keyd may take to load its keys, and the parent its certificates.
_START_SECONDS = 60.0
#: How long beyond the drain time the parent has to end.
_STOP_SECONDS = 5.0
_EVENT_OCTETS = 64 * 1024


def serve(checked: Checked) -> int:
    """Serve a configuration without mistakes; returns the exit code."""
    configuration = checked.configuration
    if configuration is None:
        raise ValueError("a configuration with mistakes")
    if os.geteuid() != 0:
        print(
            "titus-py: serve must be started as root: it gives each connection's process a uid "
            "and namespaces of its own, and everything else up",
            file=sys.stderr,
        )
        return 1
    forbid_core_dumps()
    hide_memory()
    _prepare_chroot(configuration.worker.chroot)
    listeners: list[socket.socket] = []
    for listen in configuration.listen:
        try:
            listeners.append(_bind(listen.address))
        except OSError as error:
            print(f"titus-py: cannot listen on {listen.address}: {error.strerror}", file=sys.stderr)
            return 1
    return _Supervisor(checked, configuration, listeners).run()


class _Supervisor:
    def __init__(
        self, checked: Checked, configuration: Configuration, listeners: list[socket.socket]
    ) -> None:
        self._checked = checked
        self._configuration = configuration
        self._listeners = listeners
        self._log = Log(configuration.log.format)
        self._loop = EventLoop()
        self._addresses: dict[Address, tuple[ResolvedAddress, ...]] = {}
        self._filters = {
            "handshake": seccomp.build(HANDSHAKE).hex(),
            "established": seccomp.build(ESTABLISHED).hex(),
            "keyd": seccomp.build(SERVING).hex(),
        }
        keep_capabilities(SUPERVISOR_CAPABILITIES)
        self._resolver = Resolver([vhost.backend for vhost in configuration.vhost])
        self._children: list[Child] = []
        self._keyd: Child | None = None
        self._parent: Child | None = None
        self._starting: dict[int, Timer] = {}
        self._failures: deque[float] = deque(maxlen=_FAILURES)
        self._stops = 0
        self._listening_told = False
        self._exit_code: int | None = None

    # --- life -------------------------------------------------------------------

    def run(self) -> int:
        self._hear_signals()
        self._loop.watch(
            self._resolver.descriptor, lambda: self._resolver.collect(self._take_addresses)
        )
        self._log("start", pid=os.getpid(), vhosts=len(self._configuration.vhost))
        for warning in self._checked.warnings:
            self._log("configuration", level="warning", problem=str(warning))
        self._start_generation()
        while self._exit_code is None:
            self._loop.run_once()
        self._log("stop", code=self._exit_code)
        self._log.close()
        return self._exit_code

    def _hear_signals(self) -> None:
        """Signals, as octets on a socket (signal.set_wakeup_fd)."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._wakeup = ours, theirs

        def hear() -> None:
            for number in ours.recv(64):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._stop(signal.Signals(number).name)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        self._loop.watch(ours.fileno(), hear)

    def _stop(self, reason: str) -> None:
        """Once: let connections end. Twice: end them."""
        self._stops += 1
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        if self._parent is None:
            self._finish(0)
        elif self._stops == 1:
            drain = self._configuration.worker.drain
            self._log("stopping", reason=reason, drain=drain)
            self._parent.send({"do": "drain", "seconds": drain})
            self._loop.after(drain + _STOP_SECONDS, self._parent.kill)
        else:
            self._log("stopping_at_once", level="warning", reason=reason)
            self._parent.send({"do": "close"})
            self._loop.after(_STOP_SECONDS, self._parent.kill)

    def _finish(self, code: int) -> None:
        """Leave nothing behind, and leave."""
        for child in self._children:
            child.kill()
        for child in self._children:
            self._let_go(child)
        self._children.clear()
        self._exit_code = code

    def _give_up(self) -> None:
        self._log(
            "giving_up",
            level="alarm",
            reason=f"{_FAILURES} failures within {_FAILURES_SECONDS:g} s: see the lines above",
        )
        self._finish(1)

    # --- children ---------------------------------------------------------------

    def _start_generation(self) -> None:
        control = self._start_keyd()
        parent = start_parent(self._plan(), control)
        self._adopt(parent)
        self._parent = parent

    def _start_keyd(self) -> socket.socket:
        configuration = self._configuration
        files = dict.fromkeys((vhost.key, vhost.passphrase_file) for vhost in configuration.vhost)
        keyd, control = start_keyd(
            {
                "uid": configuration.keyd.user.uid,
                "gid": configuration.keyd.user.gid,
                "chroot": str(configuration.worker.chroot),
                "filter": self._filters["keyd"],
                "keys": [
                    {"key": str(key), "passphrase_file": phrase and str(phrase)}
                    for key, phrase in files
                ],
            }
        )
        self._adopt(keyd)
        self._keyd = keyd
        return control

    def _adopt(self, child: Child) -> None:
        self._children.append(child)
        self._starting[child.pid] = self._loop.after(_START_SECONDS, child.kill)
        self._loop.watch(child.pidfd, lambda: self._bury(child))
        self._loop.watch(child.socket.fileno(), lambda: self._hear(child))

    def _hear(self, child: Child) -> None:
        """What a child has to say is an event for the log."""
        for _ in range(100):
            try:
                message = child.socket.recv(_EVENT_OCTETS)
            except BlockingIOError:
                return
            except ConnectionResetError:
                message = b""
            if not message:
                self._loop.unwatch(child.socket.fileno())
                child.socket.close()
                return
            event = json.loads(message)
            name = event.pop("event")
            if name in ("ready", "serving"):
                self._starting.pop(child.pid).cancel()
                self._log(f"{child.name}_started", pid=child.pid, **event)
                self._tell_listening()
            else:
                self._log(name, **event)

    def _tell_listening(self) -> None:
        if self._listening_told or self._starting or self._stops:
            return
        self._listening_told = True
        for listen in self._configuration.listen:
            self._log("listening", address=str(listen.address))

    def _bury(self, child: Child) -> None:
        """A child has ended: as it was told to, or not."""
        if child.socket.fileno() >= 0:
            self._hear(child)
        how = self._let_go(child)
        self._children.remove(child)
        starting = self._starting.pop(child.pid, None)
        if starting is not None:
            starting.cancel()
        if child not in (self._keyd, self._parent):
            return
        if self._stops:
            # What is being drained needs keyd no more, where it was established.
            if child is self._parent:
                self._finish(0)
            return
        self._log(f"{child.name}_died", level="alarm", pid=child.pid, how=how)
        now = time.monotonic()
        self._failures.append(now)
        if len(self._failures) == _FAILURES and now - self._failures[0] < _FAILURES_SECONDS:
            self._give_up()
        elif child is self._keyd:
            control = self._start_keyd()
            with control:
                if self._parent is not None:
                    self._parent.send({"do": "use keyd"}, [control.fileno()])
        else:
            if self._keyd is not None:
                self._keyd.kill()
            self._start_generation()

    def _let_go(self, child: Child) -> str:
        """Of a child that has ended, or is about to; returns how."""
        self._loop.unwatch(child.pidfd)
        if child.socket.fileno() >= 0:
            self._loop.unwatch(child.socket.fileno())
        return child.bury()

    # --- what the parent needs to know ------------------------------------------

    def _plan(self) -> Plan:
        worker = self._configuration.worker
        vhosts = []
        for vhost in self._configuration.vhost:
            facts = self._checked.certificates[vhost.credential]
            vhosts.append(
                VirtualHost(
                    server_names=vhost.sni,
                    local_address=vhost.local_address,
                    local_port=vhost.local_port,
                    certificate_chain=vhost.certificate.read_text(),
                    key_reference=facts.reference,
                    key=facts.key_id.hex(),
                    backend=str(vhost.backend),
                    addresses=self._addresses.get(vhost.backend, ()),
                    min_version=vhost.min_version,
                    max_version=vhost.max_version,
                    ciphers=vhost.ciphers,
                    ciphersuites=vhost.ciphersuites,
                    rsa_key_exchange=vhost.rsa_key_exchange,
                )
            )
        return Plan(
            listeners=tuple(listener.fileno() for listener in self._listeners),
            vhosts=tuple(vhosts),
            first_uid=worker.uids[0],
            last_uid=worker.uids[-1],
            max_workers=worker.max,
            spare_workers=worker.spare,
            handshake_timeout=worker.handshake_timeout,
            connect_timeout=worker.connect_timeout,
            chroot=str(worker.chroot),
            required=worker.require,
            handshake_filter=self._filters["handshake"],
            established_filter=self._filters["established"],
        )

    def _take_addresses(
        self, backend: Address, found: tuple[ResolvedAddress, ...] | OSError
    ) -> None:
        """Pass on where a backend is now; an old answer is better than none."""
        if isinstance(found, OSError):
            kept = len(self._addresses.get(backend, ()))
            reason = found.strerror
            self._log(
                "backend_unresolved", level="error", backend=str(backend), reason=reason, kept=kept
            )
            return
        if self._addresses.get(backend) == found:
            return
        self._addresses[backend] = found
        for number, vhost in enumerate(self._configuration.vhost):
            if vhost.backend == backend and self._parent is not None:
                self._parent.send({"do": "use backend", "vhost": number, "addresses": found})


def _prepare_chroot(directory: Path) -> None:
    """Make the empty directory; ``check`` has looked at one that was there already."""
    directory.mkdir(mode=0o555, parents=True, exist_ok=True)


def _bind(address: IPAddress) -> socket.socket:
    """A listening socket; raises OSError.

    The connections that it accepts inherit TCP_NODELAY and SO_LINGER from it.
    """
    listener = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reset_at_close(listener)
        if address.family == socket.AF_INET6:
            # "::" is every address of both families, any other one is itself.
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.host != "::")
        listener.bind(address.sockaddr())
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
