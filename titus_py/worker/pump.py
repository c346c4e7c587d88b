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
import select
import socket
import sys
import time
from contextlib import suppress
from socket import SocketType
from typing import NoReturn

from cryptography.hazmat.bindings import _rust
from OpenSSL import SSL
from OpenSSL._util import ffi

from titus_py.between.report import End
from titus_py.worker import alerts, flow
from titus_py.worker.ends import Ended, backend_failure, client_failure, reason
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

flow.use(
    *(
        int(ffi.cast("uintptr_t", ffi.addressof(_rust._openssl.lib, name)))
        for name in ("SSL_read", "SSL_write", "SSL_get_error", "SSL_pending")
    )
)


class Pump:
    """One connection. Both sockets are non-blocking.

    ``counts``: where the octets from and to the client are counted. A connection that stands
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
        counts: tuple[memoryview, memoryview],
        idle_timeout: float | None,
        half_closed_timeout: float,
        truncated_is_reset: bool,
    ) -> None:
        alerts.forget()
        self._client = client
        self._ssl = int(ffi.cast("uintptr_t", client._ssl))
        self._client_socket = client_socket
        self._backend = backend
        self._octets_from_client, self._octets_to_client = counts
        self._truncated_is_reset = truncated_is_reset
        self._half_closed_timeout = half_closed_timeout
        #: How long it may stand still (-1: without end), and the end that is recorded after that.
        self._patience_ms = -1 if idle_timeout is None else round(idle_timeout * 1000)
        self._stood_still = End.IDLE
        # Mapped, and not a bytearray: what is never written to takes no memory.
        self._from_client, self._from_backend = (
            memoryview(mmap.mmap(-1, _BUFFER_OCTETS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            for _ in range(2)
        )
        #: The part of each buffer that is still to be passed on.
        self._to_backend = self._from_client[:0]
        self._to_client = self._from_backend[:0]
        #: Whether this side has ended its stream, and whether that end was passed on.
        self._client_ended = self._client_end_passed = False
        self._backend_ended = self._backend_end_passed = False
        self._client_hung_up = False
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
        except Ended as ended:
            undelivered = self._deliver(ended.end)
            # The backend's is closed first: ``part`` may have to wait for the client.
            self._backend.close()
            if ended.end is End.CLIENT_PROTOCOL_ERROR:
                part(self._client_socket)
            self._client_socket.close()
            return ended.end, "; ".join(filter(None, (ended.detail, undelivered)))
        for side in (self._client_socket, self._backend):
            stop_resetting(side)
            side.close()
        return End.CLEAN, self._remark

    def _pump(self) -> None:
        """Until both directions have ended cleanly; raises Ended."""
        waits, in_flight = 0, sys.maxsize
        while not (self._client_end_passed and self._backend_end_passed):
            woken, stands_still = self._pass_on()
            if woken:
                waits, in_flight = 0, sys.maxsize
            if stands_still:
                # Nothing can be passed on, but a slow peer may still take what our kernel has.
                sides = (self._client_socket, self._backend)
                waits, before = waits + 1, in_flight
                in_flight = sum(map(unacknowledged, sides))
                if waits >= _MOST_WAITS or not 0 < in_flight < before:
                    raise Ended(self._stood_still)

    def _pass_on(self) -> tuple[bool, bool]:
        """Pass octets on until something else happens, and act on that.

        Returns whether a side was ready, and whether then neither was for as long as is waited.
        """
        woken = False
        # What is half done, with an end or within OpenSSL, is not for C.
        if not (
            self._read_wants_write
            or self._write_wants_read
            or self._client_ended != self._client_end_passed
            or self._backend_ended != self._backend_end_passed
        ):
            up, down = self._octets_from_client, self._octets_to_client
            happened, woken, result, number, self._to_backend, self._to_client = flow.run(
                self._ssl,
                self._client_socket.fileno(),
                self._backend.fileno(),
                self._patience_ms,
                (self._from_client, self._to_backend, up, not self._client_ended),
                (self._from_backend, self._to_client, down, not self._backend_ended),
            )
            if happened == flow.STOOD_STILL:
                return woken, True
            if happened != flow.UNUSUAL:
                self._act_on(happened, result, number)
                return True, False
        ready = self._step()
        return woken or ready, not ready

    def _act_on(self, happened: int, result: int, number: int) -> None:
        """One side has ended its stream, or a call of ``flow`` has failed."""
        if happened == flow.CLIENT_ENDED:
            self._client_has_ended()
        elif happened == flow.BACKEND_ENDED:
            self._backend_has_ended()
        elif happened == flow.NOT_SENT:
            self._not_sent(OSError(number, ""))
        elif happened == flow.NOT_RECEIVED:
            self._not_received(OSError(number, ""))
        else:
            # As if pyOpenSSL had made the call.
            ffi.errno = number
            try:
                self._client._raise_ssl_error(self._client._ssl, result)
            except SSL.Error as error:
                if happened == flow.NOT_READ:
                    self._end_reading(error)
                else:
                    self._not_written(error)

    def _step(self) -> bool:
        """Wait for one of the sides, and do what it is ready for; returns False if none was."""
        client_events, backend_events = self._client_events(), self._backend_events()
        poll = select.poll()
        # The client is watched until it hangs up, if only for a reset: poll(2) reports that
        # unasked.
        if client_events or not self._client_hung_up:
            poll.register(self._client_socket, client_events)
        # The backend is not watched while nothing is wanted of it: what it sent before a
        # reset must still reach the client.
        if backend_events:
            poll.register(self._backend, backend_events)
        ready = poll.poll(self._patience_ms)
        for descriptor, events in ready:
            if descriptor == self._backend.fileno():
                self._backend_ready()
            elif events & select.POLLERR:
                # Raise before anything is written to the client: what it sent must still
                # reach the backend.
                number = self._client_socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                raise Ended(End.CLIENT_RESET, reason(number))
            elif client_events:
                self._client_ready()
            else:
                # POLLHUP: both of the client's directions have ended, and the backend has yet
                # to take what the client sent. poll(2) would report that again and again.
                self._client_hung_up = True
        return bool(ready)

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
        failure: SSL.Error | None = None
        while received <= _BUFFER_OCTETS - _RECORD_OCTETS:
            try:
                octets = self._client.recv_into(self._from_client[received:], _RECORD_OCTETS)
            except SSL.Error as error:
                failure = error
                break
            received += octets
            # A short record is most often the last for now.
            if octets < _RECORD_OCTETS and not self._client.pending():
                break
        self._to_backend = self._from_client[:received]
        self._octets_from_client[0] += received
        self._end_reading(failure)

    def _end_reading(self, failure: SSL.Error | None) -> None:
        """Pass on what was read, and act on the reason why no more was, if there was one."""
        if isinstance(failure, SSL.ZeroReturnError):
            self._client_has_ended()
            return
        if isinstance(failure, SSL.WantWriteError):
            self._read_wants_write = True
        elif failure is not None and not isinstance(failure, SSL.WantReadError):
            self._client_ended = self._client_end_passed = True
            raise client_failure(failure)
        self._write_backend()

    def _client_has_ended(self) -> None:
        """The client ended its stream, with a close_notify or with a FIN alone.

        OpenSSL makes no difference between the two (``tls.note_close_notify``).
        """
        if not alerts.close_notify_received():
            if self._truncated_is_reset:
                self._client_ended = self._client_end_passed = True
                raise Ended(End.CLIENT_TRUNCATED)
            self._remark = "the client sent no close_notify"
        self._client_ended = True
        self._half_closed()
        self._write_backend()

    def _half_closed(self) -> None:
        """One direction has ended: from now on, wait less long for the other one."""
        patience_ms = round(self._half_closed_timeout * 1000)
        if not 0 <= self._patience_ms <= patience_ms:
            self._patience_ms = patience_ms
            self._stood_still = End.HALF_CLOSED

    def _write_backend(self) -> None:
        if self._to_backend:
            try:
                sent = self._backend.send(self._to_backend)
            except BlockingIOError:
                return
            except OSError as error:
                self._not_sent(error)
            self._to_backend = self._to_backend[sent:]
        if self._client_ended and not self._to_backend and not self._client_end_passed:
            self._client_end_passed = True
            try:
                self._backend.shutdown(socket.SHUT_WR)
            except OSError as error:
                raise backend_failure(error) from None

    def _not_sent(self, error: OSError) -> NoReturn:
        # EPIPE: the backend's FIN came before its RST. That FIN stays a clean end.
        self._backend_error_lost = error.errno != errno.EPIPE
        raise backend_failure(error) from None

    def _read_backend(self) -> int:
        """Returns how many octets came."""
        try:
            received = self._backend.recv_into(self._from_backend)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._not_received(error)
        if not received:
            self._backend_has_ended()
            return 0
        self._to_client = self._from_backend[:received]
        self._write_client()
        return received

    def _backend_has_ended(self) -> None:
        if self._backend_error_lost:
            self._backend_ended = self._backend_end_passed = True
        else:
            self._backend_ended = True
            self._half_closed()
        self._write_client()

    def _not_received(self, error: OSError) -> NoReturn:
        self._backend_ended = self._backend_end_passed = True
        raise backend_failure(error) from None

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
                self._octets_to_client[0] += sent
            if self._backend_ended and not self._backend_end_passed:
                self._client.shutdown()
                self._backend_end_passed = True
                # Nothing may follow a close_notify (RFC 8446 §6.1).
                with suppress(OSError):
                    self._client_socket.shutdown(socket.SHUT_WR)
        except SSL.Error as error:
            self._not_written(error)

    def _not_written(self, error: SSL.Error) -> None:
        if isinstance(error, SSL.WantWriteError):
            return
        if isinstance(error, SSL.WantReadError):
            self._write_wants_read = True
            return
        failure = client_failure(error)
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
            counts = self._octets_from_client[0], self._octets_to_client[0], len(self._to_backend)
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
            except Ended as further:
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
