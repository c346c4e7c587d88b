"""A process without privilege, as the supervisor sees it: started, watched, replaced, ended.

Run by the supervisor, which never waits for such a process. The resolver and the metrics server are
two. What they say is decoded strictly: each reads what the network sends, and may be controlled by
it.
"""

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress

from keyd.linux.descriptors import send_descriptors
from keyd.linux.process import signals_held_back
from keyd.linux.sealed import sealed_file
from titus_py.between.event_loop import EventLoop, Timer
from titus_py.between.unprivileged import ALIVE, READY, Malformed
from titus_py.supervisor.lingering import hear_alarms, not_lingering
from titus_py.supervisor.reaping import end_unwatched, note, reap
from titus_py.supervisor.record import Event

__all__ = ["UnprivilegedProcess"]

#: It says that it is alive every few seconds. If it has been silent for so long, it hangs.
_ALIVE_SECONDS, _QUIET_SECONDS = 3.0, 15.0
#: How soon to start it again, and how much later at most if it keeps dying. One that has run for
#: longer than the latter is as good as new.
_PAUSE_SECONDS = (1.0, 30.0)
#: How long one that has closed its socket may take to end by itself: how it ended is then logged.
_END_SECONDS = 1.0
_COUNT = struct.Struct("=i")


class UnprivilegedProcess:
    """``name`` is the process's room, and the word for it in events.

    ``settings`` gives what it is told at its start, its uid among them; it raises OSError if no uid
    is free. ``descriptors`` gives what it gets beside its socket to the supervisor, by the names of
    the options that say their numbers. Its messages have fewer octets than ``most_octets``.

    Set ``heard``, which is called with each message and raises Malformed, and ``changed``, which is
    called when the process has become ready, and when it has died and what it was asked is lost.
    Set ``lost`` to have another program start one that has died, and not what it is given.
    """

    def __init__(
        self,
        loop: EventLoop,
        event: Event,
        name: str,
        settings: Callable[[], Mapping[str, object]],
        most_octets: int,
        descriptors: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self._loop = loop
        self._event = event
        self._name = name
        self._settings = settings
        self._most_octets = most_octets
        self._descriptors = descriptors
        self.heard: Callable[[bytes], None] = lambda _: None
        self.changed: Callable[[], None] = lambda: None
        self.lost: Callable[[Callable[[], None]], None] = lambda start: start()
        self.ready = False
        self._wanted = False
        #: The one that runs was told to end.
        self._dismissed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._pidfd = -1
        self._started = self._last_heard = self._looked = 0.0
        self._look: Timer | None = None
        self._end: Timer | None = None
        self._again: Timer | None = None
        self._pause = _PAUSE_SECONDS[0]
        hear_alarms()

    def start(self) -> None:
        """Start it, unless it runs or is about to be started."""
        self._wanted = True
        if self._process is not None or self._again is not None:
            return
        try:
            self._start()
        except OSError as error:
            self._event("start_failed", level="error", reason=f"{self._name}: {error.strerror}")
            self._start_later()

    def send(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send it a message. Raises OSError; then it is, as a rule, about to be found dead."""
        if self._socket is not None:
            send_descriptors(self._socket, message, descriptors)

    @property
    def status(self) -> dict[str, object] | None:
        """For ``titus-py status``; None: it is not needed."""
        if not self._wanted:
            return None
        running = None if self._dismissed else self._process
        waits = "waits to be started"
        return {
            "process": self._name,
            "state": "ready" if self.ready else "starting" if running is not None else waits,
            "seconds": running and round(time.monotonic() - self._started),
            "pid": running and running.pid,
        }

    @property
    def owes(self) -> bool:
        """Whether it has not taken all that was sent to it. Raises OSError."""
        if self._socket is None:
            return False
        unread = fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(_COUNT.size))
        return bool(_COUNT.unpack(unread)[0])

    def dismiss(self) -> None:
        """End it: it is not needed any more. Its end is heard later."""
        self._wanted = False
        self.ready = False
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._process is not None:
            self._dismissed = True
            self._kill()

    def stop(self) -> None:
        """End it, and wait until it has ended. For when this program ends or is replaced."""
        self.dismiss()
        if self._process is not None:
            self._bury()

    def _start(self) -> None:
        """Raises OSError; then nothing is left of it."""
        settings = {**self._settings(), "alive_seconds": _ALIVE_SECONDS}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with ExitStack() as undo:
            undo.callback(ours.close)
            with theirs:
                process = self._execute(settings, theirs)
            note(process.pid)
            undo.callback(end_unwatched, process)
            pidfd = os.pidfd_open(process.pid)
            undo.callback(os.close, pidfd)
            self._loop.watch(pidfd, self._died)
            undo.callback(self._loop.unwatch, pidfd)
            self._loop.watch(ours.fileno(), self._hear)
            undo.pop_all()
        self._process, self._socket, self._pidfd = process, ours, pidfd
        self._dismissed = False
        self._started = self._last_heard = self._looked = time.monotonic()
        self._look = self._loop.after(_ALIVE_SECONDS, self._look_after)

    def _execute(
        self, settings: Mapping[str, object], theirs: socket.socket
    ) -> "subprocess.Popen[bytes]":
        file = sealed_file(f"{self._name}-settings", json.dumps(settings).encode())
        given = {"settings": file, "supervisor": theirs.fileno(), **self._descriptors()}
        try:
            # Only the supervisor ends it, so it must not hear signals to the whole unit.
            with signals_held_back():
                return subprocess.Popen(
                    # -I (isolated): PYTHON* variables and the current directory are ignored.
                    [
                        sys.executable,
                        "-I",
                        *_program(self._name),
                        *(f"--{name}-fd={descriptor}" for name, descriptor in given.items()),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={},
                    pass_fds=tuple(given.values()),
                    start_new_session=True,
                )
        finally:
            os.close(file)

    def _hear(self) -> None:
        if self._socket is None:
            return
        try:
            # Descriptors that come with it are closed by the kernel.
            with not_lingering():
                message = self._socket.recv(self._most_octets)
        except BlockingIOError:
            return
        except ConnectionResetError:
            message = b""
        if not message:
            # Its end is about to be heard.
            self._hang_up()
            self._end = self._loop.after(_END_SECONDS, self._kill)
            return
        self._last_heard = time.monotonic()
        self._hear_message(message)

    def _hear_message(self, message: bytes) -> None:
        if self._process is None or self._dismissed:
            return
        if message == READY and not self.ready:
            self.ready = True
            self.changed()
        elif message != ALIVE:
            try:
                if not self.ready:
                    raise Malformed("a message of one that is not ready")
                self.heard(message)
            except Malformed:
                pid = self._process.pid
                self._event("unintelligible", level="alarm", process=self._name, pid=pid)
                self._kill()
                self._hang_up()

    def _look_after(self) -> None:
        now = time.monotonic()
        # If we were not running ourselves, silence means nothing.
        if now - self._looked > 2 * _ALIVE_SECONDS:
            self._last_heard = now
        self._looked = now
        if now - self._last_heard > _QUIET_SECONDS and self._process is not None:
            self._event(f"{self._name}_hangs", level="alarm", pid=self._process.pid)
            self._kill()
        self._look = self._loop.after(_ALIVE_SECONDS, self._look_after)

    def _died(self) -> None:
        pid, how = self._bury()
        if not self._dismissed:
            self._event(f"{self._name}_died", level="alarm", pid=pid, how=how)
            if time.monotonic() - self._started > _PAUSE_SECONDS[1]:
                self._pause = _PAUSE_SECONDS[0]
            self.lost(self._start_later)
            self.changed()
        elif self._wanted:
            self.start()

    def _start_later(self) -> None:
        if not self._wanted or self._again is not None:
            return
        pause, self._pause = self._pause, min(2 * self._pause, _PAUSE_SECONDS[1])
        self._again = self._loop.after(pause, self._start_again)

    def _start_again(self) -> None:
        self._again = None
        self.start()

    def _hang_up(self) -> None:
        """Hear nothing more of it: whoever asked it for something asks the next one."""
        if self._socket is not None:
            self._loop.unwatch(self._socket.fileno())
            with not_lingering():
                self._socket.close()
            self._socket = None

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _bury(self) -> tuple[int, str]:
        """Reap it and close its descriptors; returns its pid, and how it ended."""
        assert self._process is not None
        process, self._process = self._process, None
        for timer in (self._look, self._end):
            if timer is not None:
                timer.cancel()
        self._hang_up()
        self._loop.unwatch(self._pidfd)
        how = reap(process, self._pidfd)
        os.close(self._pidfd)
        self.ready = False
        return process.pid, how


def _program(name: str) -> tuple[str, ...]:
    return ("-m", f"titus_py.{name}.life")
