"""The resolver as the supervisor sees it: started when it is needed, and again when it has died.

Run by the supervisor, which never waits for it. Its answers are decoded strictly: the resolver
reads what name servers send, and may be controlled by one of them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from keyd.linux.process import how_ended, signals_held_back
from keyd.linux.sealed import sealed_file
from titus_py.between.event_loop import EventLoop, Timer
from titus_py.between.lookups import MAX_OCTETS, Malformed, Question
from titus_py.supervisor.record import Event

__all__ = ["ResolverProcess"]

_PROGRAM = ("-m", "titus_py.resolver.life")
#: It says that it is alive every few seconds. If it has been silent for so long, it hangs.
_ALIVE_SECONDS, _QUIET_SECONDS = 3.0, 15.0
#: How soon to start it again, and how much later if it has answered nothing since.
_PAUSE_SECONDS = (1.0, 30.0)
READY, ALIVE = b"R", b"A"


class ResolverProcess:
    """``uid`` gives the uid that it is to have; it raises OSError if none is free.

    ``program`` is its system call filter, BPF in hexadecimal. Set ``heard``, which is called with
    each answer and raises Malformed, and ``changed``, which is called when the resolver has become
    ready for questions, and when it has died and the questions that it had are lost.
    """

    def __init__(self, loop: EventLoop, event: Event, uid: Callable[[], int], program: str) -> None:
        self._loop = loop
        self._event = event
        self._uid = uid
        self._program = program
        self.heard: Callable[[bytes], None] = lambda _: None
        self.changed: Callable[[], None] = lambda: None
        self.ready = False
        self._wanted = False
        #: The pid of the one that was told to end.
        self._dismissed = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._pidfd = -1
        self._last_heard = self._looked = 0.0
        self._look: Timer | None = None
        self._again: Timer | None = None
        self._pause = _PAUSE_SECONDS[0]

    def start(self) -> None:
        """Start it, unless it runs or is about to be started."""
        self._wanted = True
        if self._process is not None or self._again is not None:
            return
        try:
            self._start(self._uid())
        except OSError as error:
            self._event("start_failed", level="error", reason=f"resolver: {error.strerror}")
            self._start_later()

    def ask(self, question: Question) -> None:
        """Send a question; if that fails, the resolver is about to be found dead."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.send(question.encode())

    def dismiss(self) -> None:
        """End it: it is not needed any more. Its end is heard later."""
        self._wanted = False
        self.ready = False
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._process is not None:
            self._dismissed = self._process.pid
            self._kill()

    def stop(self) -> None:
        """End it, and wait until it has ended. For when this program ends or is replaced."""
        self.dismiss()
        if self._process is not None:
            self._bury()

    def _start(self, uid: int) -> None:
        settings = {"uid": uid, "filter": self._program, "alive_seconds": _ALIVE_SECONDS}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        given = {
            "settings-fd": sealed_file("resolver-settings", json.dumps(settings).encode()),
            "supervisor-fd": theirs.detach(),
        }
        arguments = [f"--{name}={descriptor}" for name, descriptor in given.items()]
        try:
            # Only the supervisor ends it, so it must not hear signals to the whole unit.
            with signals_held_back():
                process = subprocess.Popen(
                    # -I (isolated): PYTHON* variables and the current directory are ignored.
                    [sys.executable, "-I", *_PROGRAM, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={},
                    pass_fds=tuple(given.values()),
                    start_new_session=True,
                )
        except OSError:
            ours.close()
            raise
        finally:
            for descriptor in given.values():
                os.close(descriptor)
        self._process, self._socket = process, ours
        self._pidfd = os.pidfd_open(process.pid)
        self._last_heard = self._looked = time.monotonic()
        self._loop.watch(self._pidfd, self._died)
        self._loop.watch(ours.fileno(), self._hear)
        self._look = self._loop.after(_ALIVE_SECONDS, self._look_after)

    def _hear(self) -> None:
        if self._socket is None:
            return
        try:
            message = self._socket.recv(MAX_OCTETS)
        except BlockingIOError:
            return
        except ConnectionResetError:
            message = b""
        if not message:
            # Its end is about to be heard.
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
            self._socket = None
            self._kill()
            return
        self._last_heard = time.monotonic()
        self._hear_message(message)

    def _hear_message(self, message: bytes) -> None:
        if self._process is None or self._process.pid == self._dismissed:
            return
        if message == READY and not self.ready:
            self.ready = True
            self.changed()
        elif message != ALIVE:
            try:
                self.heard(message)
                self._pause = _PAUSE_SECONDS[0]
            except Malformed:
                pid = self._process.pid
                self._event("unintelligible", level="alarm", process="resolver", pid=pid)
                self._kill()

    def _look_after(self) -> None:
        now = time.monotonic()
        # If we were not running ourselves, silence means nothing.
        if now - self._looked > 2 * _ALIVE_SECONDS:
            self._last_heard = now
        self._looked = now
        if now - self._last_heard > _QUIET_SECONDS and self._process is not None:
            self._event("resolver_hangs", level="alarm", pid=self._process.pid)
            self._kill()
        self._look = self._loop.after(_ALIVE_SECONDS, self._look_after)

    def _died(self) -> None:
        pid, how = self._bury()
        if pid != self._dismissed:
            self._event("resolver_died", level="alarm", pid=pid, how=how)
            self._start_later()
            self.changed()
        elif self._wanted:
            self.start()

    def _start_later(self) -> None:
        pause, self._pause = self._pause, min(2 * self._pause, _PAUSE_SECONDS[1])
        self._again = self._loop.after(pause, self._start_again)

    def _start_again(self) -> None:
        self._again = None
        self.start()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _bury(self) -> tuple[int, str]:
        """Reap it and close its descriptors; returns its pid, and how it ended."""
        assert self._process is not None
        process, self._process = self._process, None
        if self._look is not None:
            self._look.cancel()
        if self._socket is not None:
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
            self._socket = None
        self._loop.unwatch(self._pidfd)
        os.close(self._pidfd)
        self.ready = False
        return process.pid, how_ended(process.wait())
