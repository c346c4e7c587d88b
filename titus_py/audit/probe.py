"""The live probe: a connection like any client's, and the worker that serves it.

Run by ``titus-py audit``, as root. It makes a TLS handshake and sends no data; the backend sees a
connection come and go. It reads nothing from that connection itself: another process does
(``client``), whose answers it does not trust. Certificates are not verified: the server has to
show the configured one, whichever authority signed it.
"""

import json
import os
import secrets
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from select import POLLRDHUP, poll
from types import TracebackType
from typing import NamedTuple, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from titus_py.audit.announcement import turned_away
from titus_py.audit.client import MAX_ANSWER_OCTETS
from titus_py.audit.finding import Finding, Seen, Subject, broken, holds, not_available
from titus_py.audit.instance import Process, Role, connections_to, holders
from titus_py.audit.sockets import unix_sockets
from titus_py.audit.target import CannotAudit, Target
from titus_py.between.virtual_host import select
from titus_py.configuration import VirtualHost
from titus_py.configuration.address import Bindable, IPAddress, UnixAddress, canonical_ip
from titus_py.configuration.certificate_dir import pairs
from titus_py.configuration.held_uids import process_with
from titus_py.parent.networks import Networks

__all__ = ["NO_CERTIFICATE", "Hindered", "Probe", "Unanswered"]

_SECONDS = 5.0
#: How long a worker may take to end after its connection; and the pause between two looks.
_END_SECONDS = 5.0
_PAUSE_SECONDS = 0.02
#: How long to wait for the worker to end by itself, once either side has sent close_notify.
_FAREWELL_SECONDS = 1.0
_CLIENT = (sys.executable, "-I", "-m", "titus_py.audit.client")
#: The client waits for its peer, and no longer than ``_SECONDS``.
_CLIENT_SECONDS = 30.0
#: The parent says once a second what it has turned away.
_LIMITED_SECONDS = 2.5
_VERSIONS = ("TLSv1.2", "TLSv1.3")
#: Why there is no more to see where every virtual host requires a client certificate.
NO_CERTIFICATE = "it requires a client certificate, and the audit has none"


class Unanswered(Exception):
    """There was no connection, or no handshake; the text says why."""


class Hindered(CannotAudit):
    """There was no handshake, and that is not the instance's fault; the text says why."""


class _Place(NamedTuple):
    """Where to connect to, with which server name, and which virtual host that is for."""

    address: Bindable
    name: str | None
    vhost: VirtualHost
    #: Where connections come from there, which begin with a load balancer's header; none: clients'.
    balancers: tuple[str, ...]


class _Client:
    """The process that talks TLS to the instance, on this socket. Raises CannotAudit, OSError."""

    def __init__(self, target: Target, peer: socket.socket) -> None:
        chroot = f"/proc/{target.supervisor.pid}/root{target.configuration.worker.chroot}"
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            descriptors = theirs.fileno(), peer.fileno()
            arguments = [str(_free_uid(target)), chroot, *map(str, descriptors)]
            self._process = subprocess.Popen(
                [*_CLIENT, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=descriptors,
                env={},  # Above all no OPENSSL_CONF, which could have it load anything.
            )
        self._control.settimeout(_CLIENT_SECONDS)

    def wait_until_confined(self) -> None:
        told = self._answer()
        if told.get("confined") is not True:
            reason = _plain(told.get("cannot", "it ended"))
            raise CannotAudit(f"the audit's client cannot be confined: {reason}")

    def ask(self, order: Mapping[str, object]) -> dict[str, object]:
        """An order, and the answer; empty if there is none."""
        try:
            self._control.send(json.dumps(order).encode())
        except OSError:
            return {}
        return self._answer()

    def _answer(self) -> dict[str, object]:
        try:
            answer = json.loads(self._control.recv(MAX_ANSWER_OCTETS))
        except (OSError, ValueError):
            return {}
        return answer if isinstance(answer, dict) else {}

    def end(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()


def _free_uid(target: Target) -> int:
    """One of the instance's own that nothing runs as: the last, since workers get the first."""
    for uid in reversed(target.configuration.worker.uids):
        if process_with(range(uid, uid + 1)) is None:
            return uid
    raise CannotAudit("each uid of worker.uids is in use")


def _plain(text: object) -> str:
    return "".join(filter(str.isprintable, str(text)[:200]))


class Probe:
    """One connection to an instance. Raises Unanswered where none can be made, and CannotAudit."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.place = _place(target)
        self.worker: Process | None = None
        #: The configured certificate, once the server has shown the same.
        self.certificate: x509.Certificate | None = None
        self._turned_away = turned_away(target.supervisor.pid)
        self._socket = _socket(self.place.address)
        self._client = _Client(target, self._socket)
        try:
            self._client.wait_until_confined()
            # Not before: on a busy machine its start takes longer than a client may be silent.
            self._connect()
            self._begin()
        except (CannotAudit, Unanswered):
            self.close()
            raise

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
        # The client's copy of the socket has to be gone first.
        self._client.end()
        if self._socket.fileno() >= 0:
            reset = struct.pack("ii", 1, 0)
            with suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            self._socket.close()

    def _connect(self) -> None:
        try:
            if not self.place.balancers and _is_loopback(self.place.address):
                # Whoever is here may have used up what 127.0.0.1 may have, and its network.
                numbers = (str(1 + secrets.randbelow(254)) for _ in range(3))
                self._socket.bind((".".join(("127", *numbers)), 0))
            if self.place.balancers:
                self._is_balancer()
            self._socket.connect(_reachable(self.place.address, self._target))
            if self.place.balancers:
                self._socket.sendall(b"PROXY UNKNOWN\r\n")
        except OSError as error:
            if isinstance(error, ConnectionResetError | BrokenPipeError):
                self._raise_if_turned_away()
            raise Unanswered(f"cannot connect to {self.place.address}: {error}") from None

    def _is_balancer(self) -> None:
        """Raises Unanswered if a connection would be reset because it is from elsewhere."""
        if not isinstance(self.place.address, UnixAddress):
            # The kernel chooses the same address for a datagram socket, which sends nothing here.
            with socket.socket(self._socket.family, socket.SOCK_DGRAM) as unsent:
                unsent.connect(_reachable(self.place.address, self._target))
                ours = unsent.getsockname()[0]
            if ours not in Networks(self.place.balancers):
                reason = f"accept_proxy_from does not list {ours}, where the audit connects from"
                raise Unanswered(f"no connection to {self.place.address}: {reason}")

    def _begin(self) -> None:
        self._begun = time.monotonic()
        order = {"do": "begin", "name": self.place.name, "alpn": self.place.vhost.alpn}
        if reason := self._client.ask(order).get("error"):
            self._raise_if_turned_away()
            raise Unanswered(f"no connection to {self.place.address}: {_plain(reason)}")

    def _raise_if_turned_away(self) -> None:
        """The supervisor hears of that within a second."""
        grown: list[str] = []

        def is_so() -> bool:
            now, before = turned_away(self._target.supervisor.pid), self._turned_away
            grown[:] = [limit for limit, count in now.items() if count > before.get(limit, 0)]
            return bool(grown)

        if _eventually(is_so, _LIMITED_SECONDS):
            raise Hindered(f"{self.place.address} turns clients away: limits.{grown[0]}")

    def find_worker(self) -> Finding:
        """Before the handshake: find the process that holds this connection's other end."""
        holding: list[Process] = []

        def served() -> bool:
            holding[:] = self._at_the_other_end()
            return [process.role for process in holding] == [Role.WORKER]

        def settled() -> bool:
            if not served():
                return False
            # While the parent hands the connection to the worker, both hold it.
            time.sleep(_PAUSE_SECONDS)
            return served()

        seen = _eventually(settled)
        workers = [process for process in holding if process.role is Role.WORKER]
        self.worker = workers[0] if workers else None
        named = ", ".join(f"{process.role} {process.pid}" for process in holding) or "no process"
        text = f"the connection from {_named(self._socket)} is held by {named}"
        if seen:
            verdict = holds(text).verdict
        elif not holding and self._has_been_ended():
            # A worker that cannot get a signature does so. The handshake's finding says that.
            text = "the connection had been ended before it was looked at"
            verdict = not_available(text).verdict
        else:
            verdict = broken(text).verdict
        return Finding(
            "connection",
            self._subject("before its handshake"),
            "each connection is one worker's, and nobody else of the instance holds it",
            f"a connection to {self.place.address}; its socket in everybody's /proc/PID/fd",
            text,
            verdict,
        )

    def _has_been_ended(self) -> bool:
        """Whether the other end has shut it down; nothing is read."""
        waiting = poll()
        waiting.register(self._socket, POLLRDHUP)
        return bool(waiting.poll(0))

    def _at_the_other_end(self) -> list[Process]:
        """The processes of the instance that hold it."""
        address, processes = self.place.address, self._target.processes()
        if isinstance(address, UnixAddress):
            ours = (unix_sockets() or {}).get(os.fstat(self._socket.fileno()).st_ino)
            return list(holders([ours.peer] if ours is not None else [], processes))
        host, port, *_ = self._socket.getsockname()
        return [
            process
            for process, connection in connections_to(address.port, processes).items()
            if connection.remote == (canonical_ip(host), port)
        ]

    def shake_hands(self) -> Finding:
        """Make the handshake, and compare the certificate. Raises Unanswered, Hindered."""
        late = time.monotonic() - self._begun
        answer = self._client.ask({"do": "handshake"})
        version = answer.get("version")
        if version not in _VERSIONS and self.is_refused:
            return self._certificate_finding(not_available(NO_CERTIFICATE))
        timeout = self._target.configuration.worker.handshake_timeout
        if version not in _VERSIONS and late > timeout:
            # What was seen of its worker may have been no more than its end.
            problem = (
                f"on this machine it takes longer than worker.handshake_timeout, {timeout:g} s"
            )
            raise Hindered(problem)
        if version not in _VERSIONS:
            self._raise_if_turned_away()
            reason = _plain(answer.get("error", "the audit's client has ended"))
            raise Unanswered(f"no handshake with {self.place.address}: {reason}")
        files = _files(self.place.vhost)
        where = self.place.vhost.certificate_dir or " or ".join(map(str, files))
        seen = broken(f"{version}, and another one than in {where}")
        for file in files:
            certificate = x509.load_pem_x509_certificates(file.read_bytes())[0]
            if certificate.public_bytes(Encoding.DER).hex() == answer.get("certificate"):
                self.certificate = certificate
                seen = holds(f"{version}, {certificate.subject.rfc4514_string() or 'no subject'}")
        return self._certificate_finding(seen)

    @property
    def is_refused(self) -> bool:
        """Whether the virtual host requires a certificate, which this client has not."""
        return _requires_certificate(self.place.vhost)

    def _certificate_finding(self, seen: Seen) -> Finding:
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
        """Send close_notify and close; returns whether the server sent a close_notify, too."""
        if self._client.ask({"do": "goodbye"}).get("said") is not True:
            return False
        self._client.end()
        self._socket.close()
        return True

    def _subject(self, stage: str) -> Subject:
        if self.worker is None:
            return Subject(Role.WORKER, 0, 0, stage)
        return Subject.of(self.worker, stage)


def _socket(address: Bindable) -> socket.socket:
    family = socket.AF_UNIX if isinstance(address, UnixAddress) else address.family
    made = socket.socket(family, socket.SOCK_STREAM)
    made.settimeout(_SECONDS)
    return made


def _reachable(address: Bindable, target: Target) -> str | tuple[str | int, ...]:
    """What ``connect`` takes. Raises OSError."""
    if isinstance(address, UnixAddress):
        # The instance may have another root directory.
        return f"/proc/{target.supervisor.pid}/root{address.path}"
    return address.sockaddr()


def _is_loopback(address: Bindable) -> bool:
    return isinstance(address, IPAddress) and address.host.startswith("127.")


def _named(ours: socket.socket) -> str:
    if ours.family == socket.AF_UNIX:
        return f"socket {os.fstat(ours.fileno()).st_ino}"
    return f"port {ours.getsockname()[1]}"


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
    # Where load balancers connect, this connection is refused unless it comes from one.
    listeners = sorted(configuration.listen, key=lambda listen: bool(listen.accept_proxy_from))
    # Where a certificate is required, this connection is refused.
    for wanted in sorted(configuration.vhost, key=_requires_certificate):
        for listen in listeners:
            for address in _addresses(listen.address, wanted):
                if not wanted.receives(address):
                    continue
                name = _server_name(wanted)
                offered = [vhost for vhost in configuration.vhost if vhost.receives(address)]
                chosen = select([_names(vhost) for vhost in offered], name)
                if chosen is not None:
                    balancers = listen.accept_proxy_from or ()
                    return _Place(address, name, offered[chosen], balancers)
    raise Unanswered("no virtual host can be reached from here")


def _requires_certificate(vhost: VirtualHost) -> bool:
    return vhost.client_certificates == "required"


def _addresses(listener: Bindable, vhost: VirtualHost) -> Sequence[Bindable]:
    if isinstance(listener, UnixAddress) or not listener.is_wildcard:
        return [listener]
    hosts = [vhost.local_address] if vhost.local_address else ["127.0.0.1", "::1"]
    candidates = [IPAddress(host, listener.port) for host in hosts]
    return [address for address in candidates if listener.covers(address)]


def _server_name(vhost: VirtualHost) -> str | None:
    names = _names(vhost)
    if names is None or "" in names:
        return None
    with suppress(StopIteration):
        return next(name for name in names if not name.startswith("*."))
    return names[0].replace("*", "audit", 1) if names else None


def _names(vhost: VirtualHost) -> tuple[str, ...] | None:
    """The server names that a virtual host takes: of a directory's certificates, the first's."""
    if vhost.certificate_dir is None:
        return vhost.sni
    first = x509.load_pem_x509_certificates(_files(vhost)[0].read_bytes())[0]
    extension = first.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return tuple(extension.value.get_values_for_type(x509.DNSName))


def _files(vhost: VirtualHost) -> list[Path]:
    """The certificates that a virtual host shows, or, of a directory's, may show."""
    if vhost.certificate_dir is not None:
        return [pair.certificate for pair in pairs(vhost.certificate_dir)]
    return [one.certificate for one in vhost.credentials.values()]
