"""Calls that may hang: in a file system that is somebody's program (FUSE), or another host's (NFS).

Run by ``keyd audit`` and ``keyd status``, as root. Nothing ends a thread that hangs in the kernel,
so the calls are made by processes that are forked for it. One that gets nowhere has said at which
file it is. It is killed, and not waited for: it ends once its file system answers. That file system
is avoided from then on. These processes have what an audit has, keys as well: their memory is
locked, too.
"""

import ctypes
import json
import mmap
import os
import signal
import socket
import struct
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from math import inf
from select import POLLIN, poll
from typing import Any, NamedTuple, NoReturn

import prctl

from keyd.inspection import auditors
from keyd.linux.credentials import lock_memory_meanwhile

__all__ = ["At", "Hung", "Patience", "each"]

#: In so many seconds, a call that hangs has no more than this share of a processor. One that takes
#: longer than that in all is given up as well.
_HANGS_SECONDS, _HANGS_SHARE = 30.0, 0.001
_MOST_SECONDS = 600.0
_LOOK_SECONDS = 0.5
#: Where a call is, for the process that watches it: a checksum, a length, and so much text at most.
_PLACE_HEAD, _PLACE_CHARACTERS, _PLACE_OCTETS = struct.Struct("II"), 500, 1 << 16
#: It may just be written: so often it is read then.
_PLACE_ATTEMPTS, _NOWHERE = 100, ("a file that is not known", "")
_libc = ctypes.CDLL(None)

#: To be called with the file that is looked at, and with its device if that can be avoided.
At = Callable[[str, str], None]
#: Of what is looked at, and devices to avoid. Both, and what comes of it, are JSON.
_Call = Callable[[Any, frozenset[str], At], Any]


class Hung(NamedTuple):
    """Where a call was when it was given up, and why it was."""

    where: str
    why: str
    #: There was no more time, or patience, for it.
    was_not_begun: bool = False


class Patience:
    """For so many seconds, and a moment more, calls may be waited for that are then given up.

    However many they are, and of however many ``each``. So nobody who can make any number of file
    systems that hang takes more than that.
    """

    def __init__(self, seconds: float = inf) -> None:
        self.seconds = self._left = seconds

    def take(self, seconds: float) -> None:
        self._left -= seconds

    @property
    def is_over(self) -> bool:
        return self._left <= 0


def each(
    items: Iterable[Any],
    call: _Call,
    processes: int,
    most_seconds: float = _MOST_SECONDS,
    in_all_seconds: float = inf,
    patience: Patience | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Call it for each, so many at once; yields each with what came of it, or Hung.

    One that hangs on a device that can be avoided is called once more, and avoids it. After so many
    seconds ``in_all``, those that are left are given up; once there is no more ``patience``, those
    that have not begun. The first are called first.
    """
    patience = Patience() if patience is None else patience
    waiting, avoided = deque(items), set[str]()
    until = time.monotonic() + in_all_seconds
    busy: dict[int, _Process] = {}
    idle: list[_Process] = []
    try:
        while waiting or busy:
            if time.monotonic() > until:
                why = f"not done in {in_all_seconds:g} seconds, with others"
                for process in busy.values():
                    yield process.item, Hung(process.place()[0], why)
                for item in waiting:
                    yield item, Hung("what is looked at before", why, was_not_begun=True)
                return
            if patience.is_over:
                why = f"{patience.seconds:g} seconds have gone by with what hangs"
                while waiting:
                    yield waiting.popleft(), Hung("", why, was_not_begun=True)
            while waiting and len(busy) < processes:
                process = idle.pop() if idle else _Process(call)
                process.begin(waiting.popleft(), frozenset(avoided))
                busy[process.socket.fileno()] = process
            for descriptor in _heard(busy):
                process = busy.pop(descriptor)
                answer = process.answer()
                if isinstance(answer, Hung):
                    process.end()
                else:
                    idle.append(process)
                yield process.item, answer
            for descriptor, process in list(busy.items()):
                if why := process.why_hung(most_seconds):
                    del busy[descriptor]
                    where, device = process.place()
                    process.end()
                    patience.take(process.seconds() / processes)
                    if device and device not in process.avoids:
                        avoided.add(device)
                        waiting.append(process.item)
                    else:
                        yield process.item, Hung(where, why)
    finally:
        for process in (*idle, *busy.values()):
            process.end()


def _heard(descriptors: Iterable[int]) -> list[int]:
    heard = poll()
    for descriptor in descriptors:
        heard.register(descriptor, POLLIN)
    return [descriptor for descriptor, _ in heard.poll(1000 * _LOOK_SECONDS)]


class _Process:
    """A process that makes calls, one after the other."""

    def __init__(self, call: _Call) -> None:
        self._place = mmap.mmap(-1, _PLACE_OCTETS)
        parent = os.getpid()
        self.socket, theirs = socket.socketpair()
        self._pid = os.fork()
        if not self._pid:
            self.socket.close()
            _make_calls(theirs, parent, self._place, call)
        theirs.close()
        self._lines = self.socket.makefile("rb")
        self.item: Any = None
        self.avoids: frozenset[str] = frozenset()

    def begin(self, item: Any, avoids: frozenset[str]) -> None:
        self.item, self.avoids = item, avoids
        _put(self._place, "", "")
        self._began = self._looked = time.monotonic()
        self._used = self._seconds_used()
        with suppress(BrokenPipeError):
            self.socket.sendall(json.dumps([item, sorted(avoids)]).encode() + b"\n")

    def answer(self) -> Any:
        line = b""
        with suppress(ConnectionResetError):
            line = self._lines.readline()
        if not line.endswith(b"\n"):
            return Hung(self.place()[0], "the process that looked was ended")
        answer, problem = json.loads(line)
        return Hung(self.place()[0], problem) if problem else answer

    def place(self) -> tuple[str, str]:
        """The file and its device, as the call has said."""
        for _ in range(_PLACE_ATTEMPTS):
            checksum, octets = _PLACE_HEAD.unpack_from(self._place)
            text = self._place[_PLACE_HEAD.size : _PLACE_HEAD.size + octets]
            if zlib.crc32(text) == checksum:
                where, device = json.loads(text)
                return where, device
        return _NOWHERE

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def why_hung(self, most_seconds: float) -> str:
        """Empty if it does not, or not yet."""
        now = time.monotonic()
        if now - self._began > most_seconds:
            return f"not done in {most_seconds:g} seconds"
        if now - self._looked < _HANGS_SECONDS:
            return ""
        used = self._seconds_used()
        hangs = used - self._used < _HANGS_SHARE * (now - self._looked)
        self._looked, self._used = now, used
        return f"no progress in {_HANGS_SECONDS:g} seconds" if hangs else ""

    def end(self) -> None:
        """Whatever it does. What hangs in the kernel ends later."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, os.WNOHANG)
        self._lines.close()
        self.socket.close()

    def _seconds_used(self) -> float:
        clock = ctypes.c_int()
        if _libc.clock_getcpuclockid(self._pid, ctypes.byref(clock)):
            return 0.0
        return time.clock_gettime(clock.value)


def _make_calls(orders: socket.socket, parent: int, place: mmap.mmap, call: _Call) -> NoReturn:
    """What the process does, until whoever forked it ends it, or has ended."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        prctl.set_pdeathsig(signal.SIGKILL)
        # Who reads what the audit writes waits for its end, and not for that of what hangs here.
        _keep_only(orders.fileno())
        if os.getppid() == parent:
            auditors.join()
            with suppress(OSError):
                lock_memory_meanwhile()
            for line in orders.makefile("rb"):
                item, avoids = json.loads(line)
                answer = call(item, frozenset(avoids), lambda *at: _put(place, *at))
                orders.sendall(json.dumps([answer, ""]).encode() + b"\n")
    finally:
        kind, error, _ = sys.exc_info()
        if kind is not None:
            with suppress(OSError):
                orders.sendall(json.dumps([None, f"{kind.__name__}: {error}"]).encode() + b"\n")
        os._exit(1)


def _keep_only(descriptor: int) -> None:
    os.closerange(3, descriptor)
    os.closerange(descriptor + 1, 1 << 30)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    os.close(nowhere)


def _put(place: mmap.mmap, where: str, device: str) -> None:
    text = json.dumps([where[:_PLACE_CHARACTERS], device]).encode()
    place[: _PLACE_HEAD.size + len(text)] = _PLACE_HEAD.pack(zlib.crc32(text), len(text)) + text
