"""Octets in both directions between a TLS client and a plaintext backend.

Run by the worker, once the handshake is done. What happens on one side is mirrored to the
other. A clean end of one direction (close_notify, FIN) is passed on after all octets that
came before it, and the other direction goes on. An unclean end (RST, an invalid record, or,
with ``truncated_is_reset``, a TLS stream without close_notify) is passed on as a reset, once
the other side's kernel has acknowledged what was sent before it. A receiver that takes
nothing for ``half_closed_timeout`` is reset without waiting for that, or, while our kernel has
octets for it, within twice as long. So is one that has taken a little each time, but not all within
``_MOST_WAITS`` times as long.

When this process ends, however it ends, both sockets reset their connections: they came
with SO_LINGER and a timeout of zero (``reset_at_close``). This is taken off both when both
directions have ended cleanly, and off the client's socket after an alert to it (``part``).

One loss remains: OpenSSL reads no more after a failed write. If a client resets the
connection while octets are on their way to it, what it sent is delivered only as far as it
had been read by then.
"""

import errno
import mmap
import os
import select
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from socket import SocketType

from OpenSSL import SSL

from titus_py.between.report import End
from titus_py.worker import alerts
from titus_py.worker.farewell import part, stop_resetting, unacknowledged, unread

__all__ = ["Pump"]

#: The most that is held for a direction, beside one TLS record within OpenSSL.
_BUFFER_OCTETS = 256 * 1024
#: The longest plaintext of a record (RFC 8446 §5.1). A read of this size leaves nothing
#: behind in OpenSSL, where poll(2) would not see it.
_RECORD_OCTETS = 16 * 1024

#: How long to wait before looking again whether the last octets were acknowledged, in
#: seconds: the first time, and at most.
_PAUSES = 0.001, 0.1
#: How often in a row a peer gets another ``half_closed_timeout`` because it has taken some of the
#: last octets. An honest one that is slow needs several; one that takes an octet at a time would
#: hold its place for days.
_MOST_WAITS = 16
#: Errors that say nothing beyond the name of the end.
_RESETS = errno.ECONNRESET, errno.EPIPE


class _Ended(Exception):
    """The connection is over, and its end was not clean."""

    def __init__(self, end: End, detail: str = "") -> None:
        super().__init__(end, detail)
        self.end = end
        self.detail = detail


class Pump:
    """One connection. Both sockets are non-blocking.

    ``count`` is called with the octets from and to the client so far. A connection that stands
    still for ``idle_timeout`` seconds is ended. Once a direction has ended,
    ``half_closed_timeout`` holds instead, if it is shorter. A TLS stream that ends without
    close_notify is passed on to the backend as a reset if ``truncated_is_reset``, otherwise as
    a clean end.
    """

    def __init__(
        self,
        client: SSL.Connection,
        client_socket: SocketType,
        backend: SocketType,
        count: Callable[[int, int], None],
        idle_timeout: float | None,
        half_closed_timeout: float,
        truncated_is_reset: bool,
    ) -> None:
        alerts.forget()
        self._client = client
        self._client_socket = client_socket
        self._backend = backend
        self._count = count
        self._truncated_is_reset = truncated_is_reset
        self._half_closed_timeout = half_closed_timeout
        #: How long the connection may stand still, and the end that is recorded after that.
        self._patience_ms = None if idle_timeout is None else idle_timeout * 1000
        self._stood_still = End.IDLE
        # Mapped, and not a bytearray: what is never written to takes no memory.
        self._from_client, self._from_backend = (
            memoryview(mmap.mmap(-1, _BUFFER_OCTETS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            for _ in range(2)
        )
        #: The part of each buffer that is still to be passed on.
        self._to_backend = self._from_client[:0]
        self._to_client = self._from_backend[:0]
        self._octets_from_client = 0
        self._octets_to_client = 0
        #: Whether this side has ended its stream, and whether that end was passed on.
        self._client_ended = self._client_end_passed = False
        self._backend_ended = self._backend_end_passed = False
        #: A failed write has used up the error that would tell an RST from an end of file.
        self._backend_error_lost = False
        #: The detail of a clean end.
        self._remark = ""
        #: TLS may have to write in order to read, and to read in order to write
        #: (SSL_get_error(3)).
        self._read_wants_write = False
        self._write_wants_read = False

    def run(self) -> tuple[End, str]:
        """Pump until the end; returns how it ended and, where there is one, a detail."""
        try:
            self._pump()
        except _Ended as ended:
            undelivered = self._deliver(ended.end)
            # The backend's is closed first: ``part`` may have to wait for the client.
            self._backend.close()
            if ended.end is End.CLIENT_PROTOCOL_ERROR:
                part(self._client_socket)
            self._client_socket.close()
            return ended.end, "; ".join(filter(None, (ended.detail, undelivered)))
        finally:
            self._count(self._octets_from_client, self._octets_to_client)
        for side in (self._client_socket, self._backend):
            stop_resetting(side)
            side.close()
        return End.CLEAN, self._remark

    def _pump(self) -> None:
        """Until both directions have ended cleanly; raises _Ended."""
        poll = select.poll()
        client_fd, backend_fd = self._client_socket.fileno(), self._backend.fileno()
        client_events = backend_events = 0
        client_hung_up = False
        waits, in_flight = 0, sys.maxsize
        poll.register(client_fd, client_events)
        while not (self._client_end_passed and self._backend_end_passed):
            # The client is watched until it hangs up, if only for a reset: poll(2) reports that
            # unasked.
            if client_events != (wanted := self._client_events()):
                if wanted or not client_hung_up:
                    poll.register(client_fd, wanted)
                else:
                    poll.unregister(client_fd)
                client_events = wanted
            # The backend is not watched while nothing is wanted of it: what it sent before a
            # reset must still reach the client.
            if backend_events != (wanted := self._backend_events()):
                if wanted:
                    poll.register(backend_fd, wanted)
                else:
                    poll.unregister(backend_fd)
                backend_events = wanted
            ready = poll.poll(self._patience_ms)
            if not ready:
                # Nothing can be passed on, but a slow peer may still take what our kernel has.
                sides = (self._client_socket, self._backend)
                waits, before = waits + 1, in_flight
                in_flight = sum(map(unacknowledged, sides))
                if waits >= _MOST_WAITS or not 0 < in_flight < before:
                    raise _Ended(self._stood_still)
                continue
            waits, in_flight = 0, sys.maxsize
            for descriptor, events in ready:
                if descriptor == backend_fd:
                    self._backend_ready()
                elif events & select.POLLERR:
                    # Raise before anything is written to the client: what it sent must still
                    # reach the backend.
                    number = self._client_socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    raise _Ended(End.CLIENT_RESET, _reason(number))
                elif client_events:
                    self._client_ready()
                else:
                    # POLLHUP: both of the client's directions have ended, and the backend has yet
                    # to take what the client sent. poll(2) would report that again and again.
                    poll.unregister(client_fd)
                    client_hung_up = True
            self._count(self._octets_from_client, self._octets_to_client)

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

    def _backend_ready(self) -> int:
        """Returns how many octets came."""
        if self._to_backend:
            self._write_backend()
        if not self._to_client and not self._backend_ended:
            return self._read_backend()
        return 0

    def _read_client(self) -> None:
        """Take what the client sent, as far as there is room, and pass it on."""
        self._read_wants_write = False
        received = 0
        ended: _Ended | None = None
        while received <= _BUFFER_OCTETS - _RECORD_OCTETS:
            try:
                octets = self._client.recv_into(self._from_client[received:], _RECORD_OCTETS)
            except SSL.WantReadError:
                break
            except SSL.WantWriteError:
                self._read_wants_write = True
                break
            except SSL.ZeroReturnError:
                ended = self._client_has_ended()
                break
            except SSL.Error as error:
                ended = _client_failure(error)
                break
            received += octets
            # A short record is most often the last for now. Trying to read on would cost an
            # exception.
            if octets < _RECORD_OCTETS and not self._client.pending():
                break
        self._to_backend = self._from_client[:received]
        self._octets_from_client += received
        if ended is not None:
            self._client_ended = self._client_end_passed = True
            raise ended
        self._write_backend()

    def _client_has_ended(self) -> _Ended | None:
        """The client ended its stream, with a close_notify or with a FIN alone.

        OpenSSL makes no difference between the two (``tls.note_close_notify``).
        """
        if not alerts.close_notify_received():
            if self._truncated_is_reset:
                return _Ended(End.CLIENT_TRUNCATED)
            self._remark = "the client sent no close_notify"
        self._client_ended = True
        self._half_closed()
        return None

    def _half_closed(self) -> None:
        """One direction has ended: from now on, wait less long for the other one."""
        patience_ms = self._half_closed_timeout * 1000
        if self._patience_ms is None or patience_ms < self._patience_ms:
            self._patience_ms = patience_ms
            self._stood_still = End.HALF_CLOSED

    def _write_backend(self) -> None:
        if self._to_backend:
            try:
                sent = self._backend.send(self._to_backend)
            except BlockingIOError:
                return
            except OSError as error:
                # EPIPE: the backend's FIN came before its RST. That FIN stays a clean end.
                self._backend_error_lost = error.errno != errno.EPIPE
                raise _backend_failure(error) from None
            self._to_backend = self._to_backend[sent:]
        if self._client_ended and not self._to_backend and not self._client_end_passed:
            self._client_end_passed = True
            try:
                self._backend.shutdown(socket.SHUT_WR)
            except OSError as error:
                raise _backend_failure(error) from None

    def _read_backend(self) -> int:
        """Returns how many octets came."""
        try:
            received = self._backend.recv_into(self._from_backend)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._backend_ended = self._backend_end_passed = True
            raise _backend_failure(error) from None
        if received:
            self._to_client = self._from_backend[:received]
        elif self._backend_error_lost:
            self._backend_ended = self._backend_end_passed = True
        else:
            self._backend_ended = True
            self._half_closed()
        self._write_client()
        return received

    def _write_client(self) -> None:
        """Pass on what the backend sent, a TLS record at a time.

        If OpenSSL were given several at once, it might send some twice when the client
        meanwhile begins a message of the handshake (a KeyUpdate in two parts).
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
                # Nothing may follow a close_notify (RFC 8446 §6.1).
                with suppress(OSError):
                    self._client_socket.shutdown(socket.SHUT_WR)
        except SSL.WantWriteError:
            pass
        except SSL.WantReadError:
            self._write_wants_read = True
        except SSL.Error as error:
            failure = _client_failure(error)
            if (
                failure.end is End.CLIENT_RESET
                and self._backend_ended
                and not self._to_client
                and self._client_ended
            ):
                # The client is gone, and cannot receive the close_notify. Nothing is lost by that.
                self._backend_end_passed = True
                return
            if not self._client_ended:
                self._client_ended = self._client_end_passed = True
            raise failure from None

    # --- the last octets ----------------------------------------------------------

    def _deliver(self, end: End) -> str:
        """Deliver what was sent before an unclean end; returns what did not arrive, in words.

        Meanwhile, what comes from a side that is no longer passed on is read and thrown away.
        A peer that writes first and reads afterwards might otherwise never get to read.
        """
        if end in (End.IDLE, End.HALF_CLOSED):
            return ""
        if end is End.CLIENT_PROTOCOL_ERROR:
            # OpenSSL has sent the alert.
            with suppress(OSError):
                self._client_socket.shutdown(socket.SHUT_WR)
        # From now on, a stream without close_notify has no clean end: a client that has reset the
        # connection did not end its stream.
        self._truncated_is_reset = True
        #: How much of what the backend sends is still passed on; None is all of it.
        allowance = unread(self._backend) if end is End.CLIENT_TRUNCATED else None
        thrown_away = {self._client_socket, self._backend}
        receivers = thrown_away.copy()
        self._stop_sending(end, receivers)
        pause, longest = _PAUSES
        patience, in_all = self._half_closed_timeout, self._half_closed_timeout * _MOST_WAITS
        moved: tuple[int, ...] = ()
        since = deadline = 0.0
        before = sys.maxsize
        while True:
            if allowance == 0:
                self._backend_ended = self._backend_end_passed = True
            in_flight = sum(map(unacknowledged, receivers))
            if not (in_flight or self._client_events() or self._backend_events()):
                return ""
            now = time.monotonic()
            counts = self._octets_from_client, self._octets_to_client, len(self._to_backend)
            if moved != (moved := counts):
                since, before = now, sys.maxsize
            if in_flight < before:
                deadline = min(now + patience, since + in_all)
            before = in_flight
            if now >= deadline:
                missing = in_flight + len(self._to_backend) + len(self._to_client)
                waited = patience if now < since + in_all else in_all
                return f"{missing} octets not taken in {waited:g} s"
            ready = self._wait_for(thrown_away, min(pause, deadline - now))
            pause = min(2 * pause, longest)
            try:
                if self._client_socket in ready:
                    self._client_ready()
                if self._backend in ready:
                    if allowance is not None:
                        self._from_backend = self._from_backend[:allowance]
                    came = self._backend_ready()
                    allowance = None if allowance is None else allowance - came
            except _Ended as further:
                self._stop_sending(further.end, receivers)
            self._throw_away(ready & thrown_away, thrown_away, receivers)

    def _stop_sending(self, end: End, receivers: set[SocketType]) -> None:
        """Drop what was to be sent to a side that this end leaves without any use for it."""
        if end in (End.CLIENT_RESET, End.CLIENT_PROTOCOL_ERROR):
            self._to_client = self._from_backend[:0]
            self._backend_ended = self._backend_end_passed = True
            if end is End.CLIENT_RESET:
                receivers.discard(self._client_socket)
        elif end is End.BACKEND_RESET:
            self._to_backend = self._from_client[:0]
            self._client_ended = self._client_end_passed = True
            receivers.discard(self._backend)

    def _wait_for(self, thrown_away: set[SocketType], seconds: float) -> set[SocketType]:
        """Wait for so many seconds at most; returns the sides that are ready for what is wanted."""
        poll = select.poll()
        sides = {side.fileno(): side for side in (self._client_socket, self._backend)}
        for side, events, ended in (
            (self._client_socket, self._client_events(), self._client_ended),
            (self._backend, self._backend_events(), self._backend_ended),
        ):
            if ended and side in thrown_away:
                events |= select.POLLIN
            if events:
                poll.register(side, events)
        return {sides[descriptor] for descriptor, _ in poll.poll(seconds * 1000)}

    def _throw_away(
        self,
        ready: set[SocketType],
        thrown_away: set[SocketType],
        receivers: set[SocketType],
    ) -> None:
        """Read and discard what comes from a side that is no longer passed on, until it ends."""
        for side in ready:
            if not (self._client_ended if side is self._client_socket else self._backend_ended):
                continue
            try:
                if not side.recv(_RECORD_OCTETS):
                    thrown_away.discard(side)
            except BlockingIOError:
                pass
            except OSError:
                thrown_away.discard(side)
                receivers.discard(side)


def _client_failure(error: SSL.Error) -> _Ended:
    if isinstance(error, SSL.SysCallError):
        return _Ended(End.CLIENT_RESET, _reason(error.args[0]))
    return _Ended(End.CLIENT_PROTOCOL_ERROR, describe(error))


def _backend_failure(error: OSError) -> _Ended:
    return _Ended(End.BACKEND_RESET, _reason(error.errno or 0))


def _reason(number: int) -> str:
    """The error in words (that a peer does not answer, perhaps); empty if it is a mere reset."""
    return "" if number <= 0 or number in _RESETS else os.strerror(number)


def describe(error: SSL.Error) -> str:
    """OpenSSL's reasons, in its own words."""
    reasons = [reason for _, _, reason in error.args[0]] if error.args else []
    return "; ".join(dict.fromkeys(reasons)) or "unknown TLS error"
