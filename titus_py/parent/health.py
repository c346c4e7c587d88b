"""Health checks: whether backends answer. Imported by the parent where a virtual host has them.

A check connects to a backend and, where that is configured, writes a fixed text and compares what
comes back with another. It reads no more octets than the expected text has, and compares them:
nothing that a backend sends is parsed here. Of what it has said instead, the beginning is kept, as
the reason of its state, in ASCII.
"""

import socket
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from titus_py.between.event_loop import EventLoop, Timer
from titus_py.between.plan import State
from titus_py.parent.backend import Backend
from titus_py.parent.dialer import Dialer
from titus_py.parent.outbox import Tell

__all__ = ["Checks"]

#: How often at most it is told that the state of a backend has changed.
_TELL_SECONDS = 1.0
#: Within how many seconds the first checks are spread, or one interval if that is shorter.
_SPREAD_SECONDS = 1.0
_NO_LINGER = b"\0" * 8
#: How much of another answer than the expected one is told.
_SHOWN_OCTETS = 64


class Checks:
    """Checks these backends again and again, each at most once at a time, until ``stop``.

    ``backends`` have a ``check`` each, whose index among all checks of the plan is what changes of
    state are told by.
    """

    def __init__(self, loop: EventLoop, backends: Iterable[Backend], tell: Tell) -> None:
        self._all = [
            _Checking(loop, backend, _Teller(loop, backend, number, tell))
            for number, backend in enumerate(backends)
        ]
        for number, one in enumerate(self._all):
            one.begin_after(min(_SPREAD_SECONDS, one.every) * number / len(self._all))

    def stop(self) -> None:
        """Leave every backend in the state that it has."""
        for one in self._all:
            one.stop()


class _Checking:
    """One backend's checks, one after the other."""

    def __init__(self, loop: EventLoop, backend: Backend, changed: Callable[[], None]) -> None:
        if backend.check is None:
            raise ValueError("a backend without a check")
        self._loop = loop
        self._backend = backend
        self._changed = changed
        self._health = health = backend.check.health
        self.every = health.every
        self._question = _header(backend.check.send_proxy) + (health.send or "").encode()
        self._expected = (health.expect or "").encode()
        self._answer = b""
        #: How many checks in a row have spoken against the state that the backend has.
        self._against = 0
        self._began = 0.0
        self._dialer: Dialer | None = None
        self._connected: socket.SocketType | None = None
        self._timer: Timer | None = None
        self._without_waiting = _closing(backend)

    def begin_after(self, seconds: float) -> None:
        self._timer = self._loop.after(seconds, self._begin)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._dialer is not None:
            self._dialer.cancel()
        self._hang_up()

    def _begin(self) -> None:
        self._began = time.monotonic()
        self._answer = b""
        self._dialer = Dialer(
            self._loop, self._backend.addresses, self._health.timeout, 0.0, self._dialled
        )
        self._dialer.start()

    def _dialled(self, connected: socket.SocketType | None, reason: str) -> None:
        if connected is None:
            if self._dialer is not None and self._dialer.failed_here:
                # That says nothing of the backend.
                self._next()
            else:
                self._settle(reason)
            return
        if connected.family != socket.AF_UNIX:
            # The backend is to see a client that closes, and not a reset.
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self._connected = connected
        try:
            taken = connected.send(self._question) if self._question else 0
        except OSError as error:
            self._settle(f"{error.strerror}")
            return
        if taken < len(self._question):
            self._settle(f"took {taken} of {len(self._question)} octets")
        elif not self._expected:
            self._settle("")
        else:
            left = self._health.timeout - (time.monotonic() - self._began)
            self._timer = self._loop.after(max(0.0, left), self._is_late)
            try:
                self._loop.watch(connected.fileno(), self._hear)
            except OSError:
                # No watch is left, or no memory. That says nothing of the backend, either.
                self._hang_up()
                self._next()

    def _is_late(self) -> None:
        self._settle(f"no answer in {self._health.timeout:g} s{self._beginning(', but')}")

    def _hear(self) -> None:
        if self._connected is None:
            return
        try:
            with self._without_waiting():
                octets = self._connected.recv(len(self._expected) - len(self._answer))
        except BlockingIOError:
            return
        except OSError as error:
            self._settle(f"{error.strerror}")
            return
        self._answer += octets
        if not octets:
            reason = "closed the connection before it had answered"
            self._settle(reason + self._beginning(", but for"))
        elif not self._expected.startswith(self._answer):
            self._settle("its answer is not the expected one" + self._beginning(", but"))
        elif len(self._answer) == len(self._expected):
            self._settle("")

    def _beginning(self, after: str) -> str:
        """What the backend has said, if it has: a literal of Python's, without its b."""
        return f"{after} {repr(self._answer[:_SHOWN_OCTETS])[1:]}" if self._answer else ""

    def _settle(self, reason: str) -> None:
        """The check has failed for this reason, or succeeded if there is none."""
        self._hang_up()
        backend = self._backend
        self._against = self._against + 1 if backend.up == bool(reason) else 0
        if self._against >= (self._health.fall if backend.up else self._health.rise):
            self._against = 0
            backend.state = State(not reason, time.time(), reason)
            self._changed()
        if not reason:
            backend.worked()
        self._next()

    def _hang_up(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._connected is not None:
            with suppress(KeyError):
                self._loop.unwatch(self._connected.fileno())
            with self._without_waiting():
                self._connected.close()
            self._connected = None

    def _next(self) -> None:
        self.begin_after(max(0.0, self._began + self.every - time.monotonic()))


class _Teller:
    """Tells of a backend's state when it has changed: at once, but once a second at most."""

    def __init__(self, loop: EventLoop, backend: Backend, number: int, tell: Tell) -> None:
        self._loop = loop
        self._backend = backend
        self._number = number
        self._tell = tell
        self._told = backend.state
        self._last = 0.0
        self._waits = False
        self._changes = 0

    def __call__(self) -> None:
        self._changes += 1
        left = self._last + _TELL_SECONDS - time.monotonic()
        if self._waits:
            return
        if left <= 0:
            self._say()
        else:
            self._waits = True
            self._loop.after(left, self._say)

    def _say(self) -> None:
        self._waits = False
        state, changes = self._backend.state, self._changes
        self._changes = 0
        if state is None or (self._told is not None and state.up == self._told.up and changes < 2):
            return
        self._last = time.monotonic()
        self._told = state
        fields: dict[str, Any] = {
            "backend": self._backend.name,
            "changes": changes if changes > 1 else None,
            "check": self._number,
            "since": state.since,
        }
        if state.up:
            self._tell("backend_up", level="warning", **fields)
        else:
            self._tell("backend_down", level="error", reason=state.reason, **fields)


def _closing(backend: Backend) -> Callable[[], AbstractContextManager[None]]:
    """For what a backend on a unix socket may have sent: before Linux 6.16, descriptors, too."""
    if all(family != socket.AF_UNIX for family, _ in backend.addresses):
        return nullcontext
    # Others do not need it in their memory.
    from titus_py.between.closing import without_waiting

    return without_waiting


def _header(send_proxy: str | None) -> bytes:
    """What a backend that expects a PROXY header gets with a check: no client's addresses."""
    if send_proxy is None:
        return b""
    from titus_py.parent.proxy_header import without_client

    return without_client(send_proxy)
