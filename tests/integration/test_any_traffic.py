"""Any traffic at all: what the kernel had acknowledged to the worker arrives, and nothing else.

The test is the client and the backend of each connection. What a side had not brought out
of its own kernel when it reset the connection is lost with that: no worker ever saw it.
"""

import errno
import fcntl
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL

from .conftest import Serve
from .instance import Instance
from .peers import Listener, TlsClient, receive_exactly, reset
from .test_pump import MUCH

MOST = 4 << 20
SIOCOUTQ = 0x5411
PATIENCE = 60


class Step(NamedTuple):
    side: str
    #: "write" and "read" are of so many octets; all others are ends.
    what: str
    octets: int = 0


class Course(NamedTuple):
    steps: list[Step]
    client_buffer: int
    backend_buffer: int
    version: int


SIZES = st.sampled_from([0, 1, 16384, 16385, 300_000, MOST]) | st.integers(0, MOST)
STEPS = st.one_of(
    st.builds(Step, st.sampled_from(["client", "backend"]), st.just("write"), SIZES),
    st.builds(Step, st.sampled_from(["client", "backend"]), st.just("read"), SIZES),
    st.builds(Step, st.just("client"), st.sampled_from(["end", "truncate", "reset"]), st.just(0)),
    st.builds(Step, st.just("backend"), st.sampled_from(["end", "reset"]), st.just(0)),
)
COURSES = st.builds(
    Course,
    st.lists(STEPS, max_size=8),
    st.sampled_from([4096, 1 << 20]),
    st.sampled_from([4096, 1 << 20]),
    st.sampled_from([SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION]),
)


class Side:
    """One end of a connection: what it wants to send, what it sent, and what it got."""

    def __init__(self, name: str, connection: socket.socket) -> None:
        self.name = name
        self.socket = connection
        self.socket.setblocking(False)
        #: How many octets of MUCH have been asked for, and are with the kernel.
        self.wanted = self.sent = 0
        self.received = bytearray()
        self.allowance = 0
        #: How it is to end when all is sent; how it has ended; how the other one has.
        self.end = self.ended = self.heard = ""
        #: Whether it said itself that there is no more; then, a reset is no loss of that.
        self.clean = False
        #: What of its octets has to arrive at least, where that is not all.
        self.owed: int | None = None

    def queue(self, octets: int) -> None:
        if not self.end:
            self.wanted = min(self.wanted + octets, MOST)

    def acknowledged(self) -> int:
        """How many octets are in the worker's kernel, or have been."""
        return self.sent - self._in_flight()

    def _in_flight(self) -> int:
        octets: int = struct.unpack("=i", fcntl.ioctl(self.socket.fileno(), SIOCOUTQ, bytes(4)))[0]
        return octets

    def owes_what_is_there(self) -> None:
        if self.ended != "reset":
            self.owed = min(self.acknowledged(), self.sent if self.owed is None else self.owed)

    def reset(self) -> None:
        self.owes_what_is_there()
        self.end = self.ended = "reset"
        self.heard = self.heard or "nothing more: it is gone"
        reset(self.socket)

    def events(self) -> int:
        if self.ended == "reset":
            return 0
        events = 0
        if not self.ended and (self.sent < self.wanted or self.end):
            events |= select.POLLOUT
        if not self.heard and self.allowance > 0:
            events |= select.POLLIN
        return events

    def act(self, events: int) -> None:
        """What it can do now; an RST is the other one's end."""
        try:
            if events & select.POLLIN and not self.heard and self.allowance > 0:
                self.read()
            if events & select.POLLOUT and not self.ended:
                self.write()
                if self.end and self.sent == self.wanted:
                    self.pass_end()
        except BlockingIOError:
            pass
        except OSError as error:
            self.lost(error)

    def lost(self, error: OSError) -> None:
        """It was reset: it has no more to send, and hears what had come before."""
        self.ended = self.ended or "was reset"
        self.allowance = MOST
        with suppress(OSError):
            while not self.heard:
                self.read()
        # EPIPE is of a FIN that came before the RST; otherwise the RST is the end of file.
        if not self.heard or (self.heard == self.end_of_file and error.errno == errno.ECONNRESET):
            self.heard = "reset"

    def take(self, octets: bytes) -> None:
        self.received += octets
        self.allowance -= len(octets)


class BackendSide(Side):
    end_of_file = "end"

    def read(self) -> None:
        octets = self.socket.recv(min(65536, max(self.allowance, 1)))
        if octets:
            self.take(octets)
        else:
            self.heard = "end"

    def write(self) -> None:
        if self.sent < self.wanted:
            self.sent += self.socket.send(memoryview(MUCH)[self.sent : self.wanted])

    def pass_end(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)
        self.ended, self.clean = self.end, True


class ClientSide(Side):
    """``sent`` is what has been encrypted; of that, ``out`` is still to be written."""

    end_of_file = "truncation"

    def __init__(self, name: str, client: TlsClient, backend: BackendSide) -> None:
        super().__init__(name, client.socket)
        self.tls = client.tls
        self.backend = backend
        self.out = b""
        self.written = 0
        #: After so many octets on the wire, so many of its own.
        self.marks = [(0, 0)]

    def acknowledged(self) -> int:
        wire = self.written - self._in_flight()
        return max((own for on_wire, own in self.marks if on_wire <= wire), default=0)

    def read(self) -> None:
        try:
            self.take(self.tls.recv(65536))
            return
        except SSL.WantReadError:
            pass
        except SSL.ZeroReturnError:
            self.heard = "end"
            return
        octets = self.socket.recv(65536)
        if octets:
            self.tls.bio_write(octets)
        else:
            self.heard = "truncation"

    def _encrypted(self) -> bytes:
        try:
            return self.tls.bio_read(1 << 17)
        except SSL.WantReadError:
            return b""

    def write(self) -> None:
        if not self.out and self.sent < self.wanted:
            self.sent += self.tls.send(memoryview(MUCH)[self.sent : self.wanted][:16384])
            self.out = self._encrypted()
            self.marks.append((self.written + len(self.out), self.sent))
        self._write_out()

    def _write_out(self) -> None:
        count = self.socket.send(self.out) if self.out else 0
        self.out, self.written = self.out[count:], self.written + count

    def pass_end(self) -> None:
        if self.end == "end" and not self.clean and not self.out:
            self.clean = True
            self.tls.shutdown()
            self.out = self._encrypted()
            self._write_out()
        if not self.out:
            self.ended = self.end
            if self.end == "truncate":
                # What the backend sends from now on may or may not arrive.
                self.backend.owes_what_is_there()
                self.socket.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    with Listener.tcp() as listener:
        yield listener


@pytest.fixture(scope="module")
def instance(serve_all: Serve, listener: Listener) -> Instance:
    return serve_all(listener.address)


@settings(deadline=None, max_examples=150)
@given(course=COURSES)
def test_any_traffic(instance: Instance, listener: Listener, course: Course) -> None:
    listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, course.backend_buffer)
    versions = (course.version, course.version)
    client = TlsClient(instance.port, versions=versions, receive_buffer=course.client_buffer)
    with client, begun(client, listener) as accepted:
        backend = BackendSide("backend", accepted)
        follow(course.steps, ClientSide("client", client, backend), backend)


def begun(client: TlsClient, listener: Listener) -> socket.socket:
    """The backend's side of a connection that has come as far as the pump.

    One that resets it before the worker has it is a backend that is unavailable.
    """
    client.handshake().send(b"?")
    backend = listener.accept()
    assert receive_exactly(backend, 1) == b"?"
    return backend


def follow(steps: list[Step], client: ClientSide, backend: BackendSide) -> None:
    sides: dict[str, Side] = {"client": client, "backend": backend}
    fragile = False
    for step in steps:
        side = sides[step.side]
        other = backend if side is client else client
        if step.what == "write":
            side.queue(step.octets)
        elif step.what == "read":
            side.allowance += step.octets
        elif step.what == "reset" and side.ended != "reset":
            # OpenSSL reads no more after a write that failed (``pump``).
            fragile |= side is client and len(side.received) < other.sent
            side.reset()
        elif not side.end:
            side.end = step.what
        turn(sides, 0.002)
    deadline = time.monotonic() + PATIENCE
    for side in sides.values():
        side.end = side.end or "end"
    while not all(side.heard and side.ended for side in sides.values()):
        for side in sides.values():
            side.allowance = MOST
        turn(sides, 0.05)
        assert time.monotonic() < deadline, {
            name: (side.ended, side.heard, side.sent, len(side.received))
            for name, side in sides.items()
        }
    judge(client, backend, fragile)
    judge(backend, client, fragile=False)


def turn(sides: dict[str, Side], seconds: float) -> None:
    """Until nothing happens for so long, but not for ever."""
    client = sides["client"]
    assert isinstance(client, ClientSide)
    for _ in range(50):
        poll = select.poll()
        watched = {}
        for side in sides.values():
            if events := side.events():
                poll.register(side.socket, events)
                watched[side.socket.fileno()] = side
        # Octets that are in OpenSSL's hands, poll(2) does not see.
        pending = bool(client.events() & select.POLLIN and client.tls.pending())
        ready = poll.poll(0 if pending else seconds * 1000) if watched else []
        if not ready and not pending:
            return
        if pending:
            client.act(select.POLLIN)
        for descriptor, events in ready:
            side = watched[descriptor]
            hung_up = events & (select.POLLERR | select.POLLHUP)
            side.act(side.events() if hung_up else side.events() & events)


def judge(sender: Side, receiver: Side, fragile: bool) -> None:
    octets = len(receiver.received)
    assert receiver.received == MUCH[:octets]
    assert octets <= sender.sent
    if receiver.heard == "end":
        assert sender.clean
        assert octets == sender.sent
    if receiver.ended != "reset" and not fragile:
        assert octets >= (sender.sent if sender.owed is None else sender.owed)
