"""The live probe: a connection like any client's, and the worker that serves it.

Run by ``titus-py audit``. It makes a TLS handshake and sends no data; the backend sees a
connection come and go. Certificates are not verified: the server has to show the configured
one, whichever authority signed it.
"""

import socket
import ssl
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple, Self

from cryptography import x509

from titus_py.audit.finding import Finding, Subject, broken, holds, not_available
from titus_py.audit.instance import Process, Role, connections_to
from titus_py.audit.target import Target
from titus_py.between.virtual_host import select
from titus_py.configuration import VirtualHost
from titus_py.configuration.address import IPAddress, canonical_ip

__all__ = ["Probe", "Unanswered"]

_SECONDS = 5.0
#: How long a worker may take to end after its connection; and the pause between two looks.
_END_SECONDS = 5.0
_PAUSE_SECONDS = 0.02
#: How long to wait for the server's close_notify, and then for the worker to end by itself.
_FAREWELL_SECONDS = 1.0


class Unanswered(Exception):
    """There was no connection, or no handshake; the text says why."""


class _Place(NamedTuple):
    """Where to connect to, with which server name, and which virtual host that is for."""

    address: IPAddress
    name: str | None
    vhost: VirtualHost


class Probe:
    """One connection to an instance. Raises Unanswered where none can be made."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.place = _place(target)
        host, port = self.place.address
        try:
            self._socket = socket.create_connection((host, port), _SECONDS)
        except OSError as error:
            raise Unanswered(f"cannot connect to {self.place.address}: {error}") from None
        self._tls: ssl.SSLSocket | None = None
        self.worker: Process | None = None
        self.certificate: x509.Certificate | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Reset the connection, so that there is nothing that a worker could still wait for."""
        connection = self._tls or self._socket
        if connection.fileno() >= 0:
            reset = struct.pack("ii", 1, 0)
            with suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            connection.close()

    def find_worker(self) -> Finding:
        """Before the handshake: find the process that holds this connection's other end."""
        ours = self._socket.getsockname()
        holders: list[Process] = []

        def served() -> bool:
            serving = connections_to(self.place.address.port, self._target.processes())
            holders[:] = [
                process
                for process, connection in serving.items()
                if (connection.remote.host, connection.remote.port)
                == (canonical_ip(ours[0]), ours[1])
            ]
            return [process.role for process in holders] == [Role.WORKER]

        def settled() -> bool:
            if not served():
                return False
            # While the parent hands the connection to the worker, both hold it.
            time.sleep(_PAUSE_SECONDS)
            return served()

        seen = _eventually(settled)
        workers = [process for process in holders if process.role is Role.WORKER]
        self.worker = workers[0] if workers else None
        named = ", ".join(f"{process.role} {process.pid}" for process in holders) or "no process"
        text = f"the connection from port {ours[1]} is held by {named}"
        return Finding(
            "connection",
            self._subject("before its handshake"),
            "each connection is one worker's, and nobody else of the instance holds it",
            f"a connection to {self.place.address}; its socket in everybody's /proc/PID/fd",
            text,
            (holds(text) if seen else broken(text)).verdict,
        )

    def shake_hands(self) -> Finding:
        """Make the handshake, and compare the certificate. Raises Unanswered."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if self.place.vhost.alpn is not None:
            context.set_alpn_protocols(self.place.vhost.alpn)
        try:
            self._tls = context.wrap_socket(self._socket, server_hostname=self.place.name)
        except OSError as error:
            raise Unanswered(f"no handshake with {self.place.address}: {error}") from None
        self.certificate = x509.load_der_x509_certificate(self._tls.getpeercert(True) or b"")
        files = [one.certificate for one in self.place.vhost.credentials.values()]
        configured = [x509.load_pem_x509_certificates(file.read_bytes())[0] for file in files]
        text = f"{self._tls.version()}, {self.certificate.subject.rfc4514_string() or 'no subject'}"
        same = self.certificate in configured
        seen = holds(text) if same else broken(f"{text}: not {' or '.join(map(str, files))}")
        name = self.place.name or "no name"
        return Finding(
            "certificate",
            self._subject("after its handshake"),
            "clients are shown the certificate that is configured",
            f"a handshake with {self.place.address}, {name} asked for",
            seen.text,
            seen.verdict,
        )

    def end(self) -> Finding:
        """Send close_notify, then reset the connection, and see whether the worker ends."""
        worker = self.worker
        seen = not_available("its worker was not found")
        if worker is not None:
            start = time.monotonic()
            gone = self._say_goodbye() and _eventually(
                lambda: not _alive(self._target, worker), _FAREWELL_SECONDS
            )
            # A backend may go on after a client's close_notify, but not after a reset.
            self.close()
            gone = gone or _eventually(lambda: not _alive(self._target, worker), _END_SECONDS)
            seconds = time.monotonic() - start
            seen = (
                holds(f"gone within {seconds:.2f} s")
                if gone
                else broken(f"there still, {seconds:.0f} s after the connection's end")
            )
        self.close()
        return Finding(
            "end",
            self._subject("after its connection"),
            "a worker ends with its connection",
            "the connection closed, and reset if need be; the process looked for",
            seen.text,
            seen.verdict,
        )

    def _say_goodbye(self) -> bool:
        """Send close_notify; returns whether the server sent one, too."""
        if self._tls is None:
            return False
        self._tls.settimeout(_FAREWELL_SECONDS)
        try:
            self._tls.unwrap().close()
        except (OSError, ValueError):
            return False
        return True

    def _subject(self, stage: str) -> Subject:
        if self.worker is None:
            return Subject(Role.WORKER, 0, 0, stage)
        return Subject.of(self.worker, stage)


def _alive(target: Target, worker: Process) -> bool:
    return any(
        (process.pid, process.started) == (worker.pid, worker.started)
        for process in target.processes()
    )


def _eventually(condition: Callable[[], bool], seconds: float = _SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE_SECONDS)
    return True


def _place(target: Target) -> _Place:
    """The first virtual host that a client can reach: at which address, and by which name."""
    configuration = target.configuration
    for wanted in configuration.vhost:
        for listen in configuration.listen:
            for address in _addresses(listen.address, wanted):
                if not wanted.receives(address):
                    continue
                name = _server_name(wanted)
                offered = [vhost for vhost in configuration.vhost if vhost.receives(address)]
                chosen = select([vhost.sni for vhost in offered], name)
                if chosen is not None:
                    return _Place(address, name, offered[chosen])
    raise Unanswered("no virtual host can be reached from here")


def _addresses(listener: IPAddress, vhost: VirtualHost) -> list[IPAddress]:
    if not listener.is_wildcard:
        return [listener]
    hosts = [vhost.local_address] if vhost.local_address else ["127.0.0.1", "::1"]
    candidates = [IPAddress(host, listener.port) for host in hosts]
    return [address for address in candidates if listener.covers(address)]


def _server_name(vhost: VirtualHost) -> str | None:
    if vhost.sni is None or "" in vhost.sni:
        return None
    with suppress(StopIteration):
        return next(name for name in vhost.sni if not name.startswith("*."))
    return vhost.sni[0].replace("*", "audit", 1)
