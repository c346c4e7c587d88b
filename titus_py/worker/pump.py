"""Octets in both directions between a TLS client and a plaintext backend.

Run by the worker, once the handshake is done. What happens on one side is mirrored to the
other. A clean end of one direction (close_notify, FIN) is passed on after all octets that
came before it, and the other direction goes on. An unclean end (RST, an invalid record, or,
with ``truncated_is_reset``, a TLS stream without close_notify) is passed on as a reset, once
the other side's kernel has acknowledged what was sent before it. A receiver that takes
nothing for ``half_closed_timeout`` is reset without waiting for that, or, while our kernel has
octets for it, within twice as long. So is one that has taken a little each time, but not all within
``_MOST_WAITS`` times as long.

OpenSSL encrypts and decrypts in memory, and never sees the client's socket. So a write never waits
within OpenSSL, where a message from the client would meet it half done; and whatever becomes of the
one direction, the other one can be read.

When this process ends, however it ends, both sockets reset their connections: they came
with SO_LINGER and a timeout of zero (``reset_at_close``). This is taken off both when both
directions have ended cleanly, and off the client's socket after an alert to it (``part``).
"""

import errno
import select
import socket
import sys
import time
from contextlib import suppress
from socket import SocketType

from cryptography.hazmat.bindings import _rust
from OpenSSL import SSL
from OpenSSL._util import ffi, lib

from keyd.linux.calls import memory
from keyd.linux.memory import map_private
from titus_py.between.report import End
from titus_py.worker import flow
from titus_py.worker.ends import Ended, backend_failure, client_failure, reason
from titus_py.worker.farewell import part, stop_resetting, unacknowledged, unread

__all__ = ["ROOM_OCTETS", "Pump"]

#: The most that is held for a direction, beside a part of one TLS record within OpenSSL.
_BUFFER_OCTETS = 256 * 1024
#: Half of it is for data: four records. The other half is for answers to KeyUpdates.
_ENCRYPTED_OCTETS = 2 * 4 * (16 * 1024 + 512)
ROOM_OCTETS = 2 * _BUFFER_OCTETS + _ENCRYPTED_OCTETS
#: What is thrown away at once.
_PIECE_OCTETS = 16 * 1024
#: More than any backend can send.
_EVERYTHING = (1 << 64) - 1

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
        for name in ("SSL_read", "SSL_write", "SSL_get_error", "BIO_read", "BIO_write")
    )
)


class Pump:
    """One connection, which comes later. Both sockets are non-blocking.

    A connection that stands still for ``idle_timeout`` seconds is ended. Once a direction has
    ended, ``half_closed_timeout`` holds instead, if it is shorter. Its buffers are in ``room``
    (ROOM_OCTETS), or in a mapping that ends with the process.
    """

    def __init__(
        self,
        idle_timeout: float | None,
        half_closed_timeout: float,
        room: memoryview | None = None,
    ) -> None:
        self._half_closed_timeout = half_closed_timeout
        #: How long it may stand still (-1: without end), and the end that is recorded after that.
        self._patience_ms = -1 if idle_timeout is None else round(idle_timeout * 1000)
        self._stood_still = End.IDLE
        if room is None:
            # Not a bytearray: what is never written to takes no memory.
            room = memory(map_private(ROOM_OCTETS), ROOM_OCTETS)
        self._from_client = room[:_BUFFER_OCTETS]
        self._from_backend = room[_BUFFER_OCTETS : 2 * _BUFFER_OCTETS]
        self._from_tls = room[2 * _BUFFER_OCTETS :]
        #: The part of each buffer that is still to be passed on.
        self._to_backend = self._from_client[:0]
        self._to_client = self._from_backend[:0]
        self._encrypted = self._from_tls[:0]
        #: How many octets of plaintext there are within ``_encrypted``.
        self._encrypted_count = memoryview(bytearray(8)).cast("Q")
        #: What becomes of the client's stream, and of the backend's.
        self._up = self._down = flow.OPEN
        #: How much of what the backend sends is still passed on.
        self._allowance = _EVERYTHING
        #: A failed write has used up the error that would tell an RST from an end of file.
        self._backend_error_lost = False
        #: The detail of a clean end.
        self._remark = ""

    def begin(
        self,
        client: SSL.Connection,
        client_socket: SocketType,
        counts: tuple[memoryview, memoryview],
        truncated_is_reset: bool,
    ) -> None:
        """Take the client, whose handshake is done.

        ``counts``: where the octets from and to the client are counted. A TLS stream that ends
        without close_notify is passed on to the backend as a reset if ``truncated_is_reset``,
        otherwise as a clean end.
        """
        self._client = client
        self._client_socket = client_socket
        self._octets_from_client, self._octets_to_client = counts
        self._truncated_is_reset = truncated_is_reset
        self._tls = self._in_memory()

    def run(self, backend: SocketType) -> tuple[End, str]:
        """Pump until the end; returns how it ended and, where there is one, a detail."""
        self._backend = backend
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

    def touch(self, backend: SocketType) -> None:
        """Go through what a connection goes through, with nothing to pass on."""
        self._backend = backend
        self._up = self._down = flow.OVER
        self._pass_on(0)
        self._up = self._down = flow.OPEN

    def _in_memory(self) -> tuple[int, int, int]:
        """Take the client's socket from OpenSSL; returns an SSL, and what goes in and comes out.

        The handshake is done: OpenSSL holds nothing that it has read or has still to write.
        """
        bios = [lib.BIO_new(lib.BIO_s_mem()) for _ in range(2)]
        if ffi.NULL in bios:
            raise MemoryError
        # It owns them now.
        lib.SSL_set_bio(self._client._ssl, *bios)
        # An error that was left behind would be taken for one of the next call's.
        lib.ERR_clear_error()
        ssl, into, out_of = (
            int(ffi.cast("uintptr_t", each)) for each in (self._client._ssl, *bios)
        )
        return ssl, into, out_of

    def _pump(self) -> None:
        """Until both directions have ended cleanly; raises Ended."""
        waits, in_flight = 0, sys.maxsize
        while not self._up == self._down == flow.OVER:
            woken, stands_still = self._pass_on(self._patience_ms)
            if woken:
                waits, in_flight = 0, sys.maxsize
            if stands_still:
                # Nothing can be passed on, but a slow peer may still take what our kernel has.
                sides = (self._client_socket, self._backend)
                waits, before = waits + 1, in_flight
                in_flight = sum(map(unacknowledged, sides))
                if waits >= _MOST_WAITS or not 0 < in_flight < before:
                    raise Ended(self._stood_still)

    def _pass_on(self, patience_ms: int) -> tuple[bool, bool]:
        """Pass octets on until something else happens, and act on that. Raises Ended.

        Returns whether a side was ready, and whether then neither was for as long as is waited.
        """
        (
            happened,
            woken,
            result,
            number,
            self._to_backend,
            self._to_client,
            self._encrypted,
            self._allowance,
        ) = flow.run(
            self._tls,
            self._client_socket.fileno(),
            self._backend.fileno(),
            patience_ms,
            (self._from_client, self._to_backend, self._octets_from_client, self._up),
            (self._from_backend, self._to_client, self._octets_to_client, self._down),
            (self._from_tls, self._encrypted, self._encrypted_count),
            self._allowance,
        )
        if happened == flow.STOOD_STILL:
            return woken, True
        if happened in (flow.NOT_DECRYPTED, flow.NOT_ENCRYPTED):
            self._tls_failed(result)
        elif happened in (flow.NOT_TO_BACKEND, flow.NOT_FROM_BACKEND):
            self._backend_failed(happened, number)
        elif happened in (flow.CLIENT_FAILED, flow.NOT_TO_CLIENT, flow.NOT_FROM_CLIENT):
            self._client_failed(happened, number)
        elif happened in (flow.CLIENT_ENDED, flow.CLIENT_TRUNCATED):
            self._client_has_ended(happened)
        elif happened == flow.BACKEND_ENDED:
            self._backend_has_ended()
        elif happened == flow.CLIENT_SPOKE:
            self._make_the_end()
        elif happened == flow.ALL_TO_BACKEND:
            self._end_to_backend()
        elif happened == flow.ALL_TO_CLIENT:
            self._end_to_client()
        return True, False

    # --- ends -------------------------------------------------------------------------

    def _client_has_ended(self, happened: int) -> None:
        """The client ended its stream: with a close_notify, or with a FIN alone."""
        if happened == flow.CLIENT_TRUNCATED:
            if self._truncated_is_reset:
                self._up = flow.OVER
                raise Ended(End.CLIENT_TRUNCATED)
            self._remark = "the client sent no close_notify"
        self._up = flow.ENDING
        self._half_closed()
        if self._down == flow.HELD_UP:
            self._make_the_end()

    def _backend_has_ended(self) -> None:
        if self._backend_error_lost:
            self._down = flow.OVER
            return
        self._half_closed()
        self._make_the_end()

    def _make_the_end(self) -> None:
        """Have OpenSSL make a close_notify: it does not in the middle of a client's message."""
        try:
            self._client.shutdown()
        except SSL.Error:
            self._down = flow.HELD_UP
        else:
            self._down = flow.ENDING

    def _half_closed(self) -> None:
        """One direction has ended: from now on, wait less long for the other one."""
        patience_ms = round(self._half_closed_timeout * 1000)
        if not 0 <= self._patience_ms <= patience_ms:
            self._patience_ms = patience_ms
            self._stood_still = End.HALF_CLOSED

    def _end_to_backend(self) -> None:
        self._up = flow.OVER
        try:
            self._backend.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise backend_failure(error) from None

    def _end_to_client(self) -> None:
        # Nothing may follow a close_notify (RFC 8446 §6.1), or an alert that is fatal.
        self._down = flow.OVER
        with suppress(OSError):
            self._client_socket.shutdown(socket.SHUT_WR)

    def _tls_failed(self, result: int) -> None:
        self._up = flow.OVER
        # As if pyOpenSSL had made the call.
        try:
            self._client._raise_ssl_error(self._client._ssl, result)
        except SSL.Error as error:
            raise client_failure(error) from None

    def _client_failed(self, happened: int, number: int) -> None:
        if happened == flow.CLIENT_FAILED:
            # What it sent is still there.
            number = self._client_socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        elif happened == flow.NOT_FROM_CLIENT:
            self._up = flow.OVER
        elif self._down == flow.ENDING and self._up != flow.OPEN and not self._encrypted_count[0]:
            # It is gone, and cannot receive the close_notify. Nothing is lost by that.
            self._encrypted = self._from_tls[:0]
            self._down = flow.OVER
            return
        raise Ended(End.CLIENT_RESET, reason(number))

    def _backend_failed(self, happened: int, number: int) -> None:
        if happened == flow.NOT_FROM_BACKEND:
            self._down = flow.OVER
        else:
            # EPIPE: the backend's FIN came before its RST. That FIN stays a clean end.
            self._backend_error_lost = number != errno.EPIPE
        raise backend_failure(OSError(number, ""))

    # --- the last octets ----------------------------------------------------------

    def _deliver(self, end: End) -> str:
        """Deliver what was sent before an unclean end; returns what did not arrive, in words.

        Meanwhile, what comes from a side that is no longer passed on is read and thrown away.
        A peer that writes first and reads afterwards might otherwise never get to read.
        """
        if end in (End.IDLE, End.HALF_CLOSED):
            return ""
        # From now on, a stream without close_notify has no clean end: a client that has reset the
        # connection did not end its stream.
        self._truncated_is_reset = True
        if end is End.CLIENT_TRUNCATED:
            self._allowance = unread(self._backend)
        thrown_away = {self._client_socket, self._backend}
        receivers = thrown_away.copy()
        self._stop_sending(end, receivers)
        pause, longest = _PAUSES
        patience, in_all = self._half_closed_timeout, self._half_closed_timeout * _MOST_WAITS
        moved: tuple[int, ...] = ()
        since = deadline = 0.0
        before = sys.maxsize
        while True:
            in_flight = sum(map(unacknowledged, receivers))
            if not (in_flight or self._is_busy()):
                return ""
            now = time.monotonic()
            counts = self._octets_from_client[0], self._octets_to_client[0], len(self._to_backend)
            if moved != (moved := counts):
                since, before = now, sys.maxsize
            if in_flight < before:
                deadline = min(now + patience, since + in_all)
            before = in_flight
            if now >= deadline:
                here = len(self._to_backend) + len(self._to_client) + self._encrypted_count[0]
                waited = patience if now < since + in_all else in_all
                return f"{in_flight + here} octets not taken in {waited:g} s"
            ready = self._wait_for(thrown_away, min(pause, deadline - now))
            pause = min(2 * pause, longest)
            try:
                self._pass_on(0)
            except Ended as further:
                self._stop_sending(further.end, receivers)
            self._throw_away(ready & thrown_away, thrown_away, receivers)

    def _stop_sending(self, end: End, receivers: set[SocketType]) -> None:
        """Drop what was to be sent to a side that this end leaves without any use for it."""
        if end is End.CLIENT_RESET:
            self._to_client, self._encrypted = self._from_backend[:0], self._from_tls[:0]
            self._down = flow.OVER
            receivers.discard(self._client_socket)
            # By a unix socket, it may have ended its receiving half alone, and go on sending. What
            # it has sent can still be read, and no more can come.
            with suppress(OSError):
                self._client_socket.shutdown(socket.SHUT_RD)
        elif end is End.CLIENT_PROTOCOL_ERROR:
            # OpenSSL has made an alert, which follows what is encrypted already.
            self._to_client = self._from_backend[:0]
            self._down = flow.ENDING
        elif end is End.BACKEND_RESET:
            self._to_backend = self._from_client[:0]
            self._up = flow.OVER
            receivers.discard(self._backend)

    def _reads_client(self) -> bool:
        full = len(self._encrypted) > _ENCRYPTED_OCTETS // 2
        return self._up == flow.OPEN and not self._to_backend and not full

    def _passes_down(self) -> bool:
        """Whether what the backend still sends is passed on."""
        return self._down == flow.OPEN and self._allowance > 0

    def _reads_backend(self) -> bool:
        return self._passes_down() and not self._to_client and not self._encrypted

    def _is_busy(self) -> bool:
        """Whether there is anything left to pass on, or to wait for."""
        held = self._to_backend or self._to_client or self._encrypted
        ending = flow.ENDING in (self._up, self._down)
        return bool(held) or ending or self._up == flow.OPEN or self._reads_backend()

    def _wait_for(self, thrown_away: set[SocketType], seconds: float) -> set[SocketType]:
        """Wait for so many seconds at most; returns the sides that are ready for what is wanted."""
        poll = select.poll()
        sides = {side.fileno(): side for side in (self._client_socket, self._backend)}
        for side, reads, ended, writes in (
            (self._client_socket, self._reads_client(), self._up != flow.OPEN, self._encrypted),
            (self._backend, self._reads_backend(), not self._passes_down(), self._to_backend),
        ):
            events = select.POLLOUT if writes else 0
            if reads or (ended and side in thrown_away):
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
            is_client = side is self._client_socket
            if self._up == flow.OPEN if is_client else self._passes_down():
                continue
            try:
                if not side.recv(_PIECE_OCTETS):
                    thrown_away.discard(side)
            except BlockingIOError:
                pass
            except OSError:
                thrown_away.discard(side)
                receivers.discard(side)
