"""Octets in both directions between a TLS client and a plaintext backend.

Run by the worker, once the handshake is done. What happens on one side is mirrored
to the other: a clean end of one direction (close_notify, FIN) is passed on when
all that came before it has been, and the other direction goes on; an unclean one
(RST, a TLS stream without its close_notify) is passed on as a reset.

A reset is what both sockets do by themselves when this process ends, however it
ends: they came with SO_LINGER and a timeout of zero (``reset_at_close``). Only a
connection that came to a clean end in both directions has that taken off.
"""

import mmap
import select
import socket
from collections.abc import Callable
from socket import SocketType

from OpenSSL import SSL

from titus_py.between.report import End

__all__ = ["Pump"]

#: What is held at most for a direction, beside one TLS record within OpenSSL.
_BUFFER_OCTETS = 256 * 1024
#: A record's plaintext at most (RFC 8446 §5.1): a read of this size leaves nothing
#: behind in OpenSSL, where poll(2) would not see it.
_RECORD_OCTETS = 16 * 1024

_Broken = (ConnectionResetError, BrokenPipeError, TimeoutError, ConnectionAbortedError)


class _Ended(Exception):
    """The connection is over, uncleanly; both sides are to be reset."""

    def __init__(self, end: End, detail: str = "") -> None:
        super().__init__(end, detail)
        self.end = end
        self.detail = detail


class Pump:
    """One connection. Both sockets are non-blocking.

    ``count`` is told the octets from and to the client so far. A connection that
    stands still for ``idle_timeout`` seconds is ended.
    """

    def __init__(
        self,
        client: SSL.Connection,
        client_socket: SocketType,
        backend: SocketType,
        count: Callable[[int, int], None],
        idle_timeout: float | None = None,
    ) -> None:
        self._client = client
        self._client_socket = client_socket
        self._backend = backend
        self._count = count
        self._idle_ms = None if idle_timeout is None else idle_timeout * 1000
        # Mapped, and not a bytearray: what is never written to takes no memory.
        self._from_client, self._from_backend = (
            memoryview(mmap.mmap(-1, _BUFFER_OCTETS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            for _ in range(2)
        )
        #: What of it is still to be passed on.
        self._to_backend = self._from_client[:0]
        self._to_client = self._from_backend[:0]
        self._octets_from_client = 0
        self._octets_to_client = 0
        #: The direction has no more to come; then, that this was passed on.
        self._client_ended = self._client_end_passed = False
        self._backend_ended = self._backend_end_passed = False
        self._backend_broken = False
        #: TLS may need the opposite of what is being done (SSL_get_error(3)).
        self._read_wants_write = False
        self._write_wants_read = False

    def run(self) -> tuple[End, str]:
        """Pump until the end; returns how it ended and, where there is one, a detail."""
        poll = select.poll()
        client_fd, backend_fd = self._client_socket.fileno(), self._backend.fileno()
        client_events = backend_events = 0
        poll.register(client_fd, client_events)
        try:
            while not (self._client_end_passed and self._backend_end_passed):
                # The client always, were it only for a reset, which poll(2) reports unasked.
                if client_events != (wanted := self._client_events()):
                    poll.register(client_fd, wanted)
                    client_events = wanted
                # The backend not where nothing is wanted of it: what it had sent before a
                # reset is still the client's.
                if backend_events != (wanted := self._backend_events()):
                    if wanted:
                        poll.register(backend_fd, wanted)
                    else:
                        poll.unregister(backend_fd)
                    backend_events = wanted
                ready = poll.poll(self._idle_ms)
                if not ready:
                    raise _Ended(End.IDLE)
                for descriptor, _ in ready:
                    if descriptor == backend_fd:
                        self._backend_ready()
                    elif client_events:
                        self._client_ready()
                    else:
                        raise _Ended(End.CLIENT_RESET)
                self._count(self._octets_from_client, self._octets_to_client)
        except _Ended as ended:
            # Not left to Python: of a socket that it finds unclosed, it would first ask
            # the peer's name, which is nothing that a worker may.
            self._close()
            return ended.end, ended.detail
        finally:
            self._count(self._octets_from_client, self._octets_to_client)
        for side in (self._client_socket, self._backend):
            stop_resetting(side)
        self._close()
        return End.CLEAN, ""

    def _client_events(self) -> int:
        events = 0
        if not self._to_backend and not self._client_ended:
            events |= select.POLLOUT if self._read_wants_write else select.POLLIN
        if self._to_client or (self._backend_ended and not self._backend_end_passed):
            events |= select.POLLIN if self._write_wants_read else select.POLLOUT
        return events

    def _backend_events(self) -> int:
        events = 0
        if not self._to_client and not self._backend_ended:
            events |= select.POLLIN
        if self._to_backend:
            events |= select.POLLOUT
        return events

    def _client_ready(self) -> None:
        if not self._to_backend and not self._client_ended:
            self._read_client()
        if self._to_client or self._backend_ended:
            self._write_client()

    def _backend_ready(self) -> None:
        if self._to_backend:
            self._write_backend()
        if not self._to_client and not self._backend_ended:
            self._read_backend()

    def _read_client(self) -> None:
        """Take what the client sent, as far as there is room, and pass it on."""
        self._read_wants_write = False
        received = 0
        while received <= _BUFFER_OCTETS - _RECORD_OCTETS:
            try:
                octets = self._client.recv_into(self._from_client[received:], _RECORD_OCTETS)
            except SSL.WantReadError:
                break
            except SSL.WantWriteError:
                self._read_wants_write = True
                break
            except SSL.ZeroReturnError:
                self._client_ended = True
                break
            except SSL.SysCallError as error:
                raise _Ended(*_client_failure(error)) from None
            except SSL.Error as error:
                raise _Ended(End.CLIENT_PROTOCOL_ERROR, describe(error)) from None
            received += octets
            # A short record is most often the last for now: to look would cost an exception.
            if octets < _RECORD_OCTETS and not self._client.pending():
                break
        self._to_backend = self._from_client[:received]
        self._octets_from_client += received
        self._write_backend()

    def _write_backend(self) -> None:
        if self._to_backend:
            try:
                sent = self._backend.send(self._to_backend)
            except BlockingIOError:
                return
            except _Broken:
                self._break_backend()
                return
            self._to_backend = self._to_backend[sent:]
        if self._client_ended and not self._to_backend and not self._client_end_passed:
            self._client_end_passed = True
            try:
                self._backend.shutdown(socket.SHUT_WR)
            except OSError:
                self._break_backend()

    def _break_backend(self) -> None:
        """The backend takes no more; what it had sent before is still the client's."""
        self._backend_broken = True
        self._to_backend = self._from_client[:0]
        self._client_ended = self._client_end_passed = True
        if self._backend_ended:
            raise _Ended(End.BACKEND_RESET)

    def _read_backend(self) -> None:
        try:
            received = self._backend.recv_into(self._from_backend)
        except BlockingIOError:
            return
        except _Broken:
            raise _Ended(End.BACKEND_RESET) from None
        if received:
            self._to_client = self._from_backend[:received]
        elif self._backend_broken:
            raise _Ended(End.BACKEND_RESET)
        else:
            self._backend_ended = True
        self._write_client()

    def _write_client(self) -> None:
        """Pass on what the backend sent, a TLS record at a time.

        Not several: of those, OpenSSL may send some twice where the client meanwhile begins
        a message of the handshake (a KeyUpdate in two parts).
        """
        self._write_wants_read = False
        try:
            while self._to_client:
                sent = self._client.send(self._to_client[:_RECORD_OCTETS])
                self._to_client = self._to_client[sent:]
                self._octets_to_client += sent
            if self._backend_ended and not self._backend_end_passed:
                self._client.shutdown()
                self._backend_end_passed = True
        except SSL.WantWriteError:
            pass
        except SSL.WantReadError:
            self._write_wants_read = True
        except SSL.SysCallError as error:
            if self._backend_ended and not self._to_client and self._client_ended:
                # Nobody is left to hear the close_notify; nothing is lost by that.
                self._backend_end_passed = True
                return
            raise _Ended(*_client_failure(error)) from None
        except SSL.Error as error:
            raise _Ended(End.CLIENT_PROTOCOL_ERROR, describe(error)) from None

    def _close(self) -> None:
        for side in (self._client_socket, self._backend):
            side.close()


def _client_failure(error: SSL.SysCallError) -> tuple[End, str]:
    if error.args[0] == -1:
        return End.CLIENT_TRUNCATED, ""
    return End.CLIENT_RESET, ""


def stop_resetting(side: SocketType) -> None:
    """Let the connection be closed cleanly."""
    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))


def describe(error: SSL.Error) -> str:
    """OpenSSL's reasons, in its own words."""
    reasons = [reason for _, _, reason in error.args[0]] if error.args else []
    return "; ".join(dict.fromkeys(reasons)) or "unknown TLS error"
