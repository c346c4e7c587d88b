"""The control socket: how ``titus-py status`` and ``titus-py reload`` reach the supervisor.

Run by the supervisor. Only root may connect to the socket. Each client sends one request and
gets one answer, both JSON, each in one SOCK_SEQPACKET packet. An answer that is too long for one
comes as a sealed file, with an empty packet. A client that does not read loses its answer.
"""

import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from keyd.linux.descriptors import send_descriptors
from keyd.linux.sealed import sealed_file
from keyd.linux.unix_socket import File, bind, file_of
from titus_py.between.event_loop import EventLoop, Timer

__all__ = ["CONTROL_DIRECTORY", "Answer", "Control", "control_path", "listens"]

CONTROL_DIRECTORY = Path("/run/titus-py")
_REQUEST_OCTETS = 4096
#: The longest answer in a packet, where there is room for it (net.core.wmem_max). A status with
#: many virtual hosts is longer.
_ANSWER_OCTETS = 64 * 1024
#: Of a socket's room, the kernel keeps so much for itself.
_BESIDE_A_PACKET = 32
_MAX_CLIENTS = 16
_BACKLOG = 128
#: How soon to look again for clients when there was no descriptor for one.
_PAUSE_SECONDS = 0.5


def control_path(pid: int) -> Path:
    """Where the supervisor with this process id listens."""
    return CONTROL_DIRECTORY / f"{pid}.control"


class Answer:
    """Sends a client the answer to its request; called once. A client that has gone gets none."""

    def __init__(self, client: socket.socket, drop: Callable[[socket.socket], None]) -> None:
        self.client = client
        self._drop = drop

    def __call__(self, result: dict[str, object]) -> None:
        octets = json.dumps(result).encode()
        with suppress(OSError):
            _send(self.client, octets)
        self._drop(self.client)


class Control:
    """Listens; ``handlers`` do what a request's "do" names, and answer when they can."""

    def __init__(
        self,
        loop: EventLoop,
        handlers: Mapping[str, Callable[[Answer], None]],
        listener: socket.socket | None = None,
    ) -> None:
        """``listener`` is a socket that listens already; None: make one. Raises OSError."""
        self._loop = loop
        self._handlers = handlers
        self._clients: set[socket.socket] = set()
        #: Clients that have not sent a request yet, oldest first.
        self._silent: dict[socket.socket, None] = {}
        self._path = control_path(os.getpid())
        self.listener = listener or _listen_at(self._path)
        #: By which clients find it; None: there is none.
        self._file = _file_at(self._path)
        #: When to look for clients again.
        self._again: Timer | None = None
        self._listen()

    def look_after(self) -> bool:
        """Listen anew if somebody has removed the file; returns whether that was so.

        Raises OSError.
        """
        if self._file is not None and _file_at(self._path) == self._file:
            return False
        listener = _listen_at(self._path)
        if self._again is None:
            self._loop.unwatch(self.listener.fileno())
        else:
            self._again.cancel()
        self.listener.close()
        self.listener, self._file = listener, _file_at(self._path)
        self._listen()
        return True

    def _listen(self) -> None:
        self._again = None
        if self.listener.fileno() >= 0:
            try:
                self._loop.watch(self.listener.fileno(), self._accept)
            except OSError:
                # No watch is left, or no memory.
                self._again = self._loop.after(_PAUSE_SECONDS, self._listen)

    def adopt(self, client: socket.socket) -> Answer:
        """Take over a client whose request the previous program has not answered."""
        client.setblocking(False)
        try:
            self._loop.watch(client.fileno(), lambda: self._hear(client))
        except OSError:
            # No watch is left, or no memory. It is answered, and not missed if it goes before.
            return Answer(client, socket.socket.close)
        self._clients.add(client)
        return Answer(client, self._drop)

    def close(self) -> None:
        """Close and remove the socket. Called at the end, when the event loop has stopped."""
        self.listener.close()
        if _file_at(self._path) == self._file:
            self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        try:
            client, _ = self.listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            # No descriptor is left. The client stays in the queue and would wake us for ever.
            self._loop.unwatch(self.listener.fileno())
            self._again = self._loop.after(_PAUSE_SECONDS, self._listen)
            return
        client.setblocking(False)
        if len(self._clients) >= _MAX_CLIENTS:
            # Close the client that has been silent longest, or else the new one.
            if not self._silent:
                client.close()
                return
            self._drop(next(iter(self._silent)))
        try:
            self._loop.watch(client.fileno(), lambda: self._hear(client))
        except OSError:
            # No watch is left, or no memory. It is told by the end of its connection.
            client.close()
            return
        self._clients.add(client)
        self._silent[client] = None

    def _hear(self, client: socket.socket) -> None:
        try:
            request = client.recv(_REQUEST_OCTETS)
        except BlockingIOError:
            return
        except ConnectionResetError:
            request = b""
        self._silent.pop(client, None)
        handler = self._handlers.get(_wanted(request))
        if handler is None:
            self._drop(client)
            return
        handler(Answer(client, self._drop))

    def _drop(self, client: socket.socket) -> None:
        if client in self._clients:
            self._clients.discard(client)
            self._silent.pop(client, None)
            self._loop.unwatch(client.fileno())
            client.close()


def _send(client: socket.socket, octets: bytes) -> None:
    """Raises OSError."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ANSWER_OCTETS)
    room = client.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - _BESIDE_A_PACKET
    if len(octets) <= min(room, _ANSWER_OCTETS):
        client.send(octets)
        return
    file = sealed_file("answer", octets)
    try:
        send_descriptors(client, b"", [file])
    finally:
        os.close(file)


def _listen_at(path: Path) -> socket.socket:
    CONTROL_DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    _remove_left_behind()
    if listens(path):
        raise OSError(
            f"{path}: another instance listens there, which has the same process id in another pid "
            "namespace: give each container a directory of its own"
        )
    # A killed supervisor that had our process id may have left its socket.
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.setblocking(False)
    bind(listener, str(path), 0o600)
    listener.listen(_BACKLOG)
    return listener


def _file_at(path: Path) -> File | None:
    """Which file is there; None if there is none."""
    try:
        return file_of(os.lstat(path))
    except OSError:
        return None


def _wanted(request: bytes) -> str:
    # RecursionError: arrays nested too deeply.
    with suppress(ValueError, RecursionError):
        decoded = json.loads(request)
        if isinstance(decoded, dict):
            return str(decoded.get("do"))
    return ""


def _remove_left_behind() -> None:
    """Remove the sockets that killed supervisors left.

    A socket that listens is kept: its supervisor is alive, in another pid namespace.
    """
    for path in CONTROL_DIRECTORY.glob("*.control"):
        if path.stem.isdecimal() and not _exists(int(path.stem)) and not listens(path):
            path.unlink(missing_ok=True)


def listens(path: Path) -> bool:
    """Whether a supervisor listens on this control socket. Raises PermissionError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True  # It listens; its queue is full.
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True


def _exists(pid: int) -> bool:
    """Whether a process exists. /proc is not asked: it may be hidden there (ProtectProc=)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
