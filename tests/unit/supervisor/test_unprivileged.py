"""A process without privilege that hangs, or says what it never says, is replaced."""

import ctypes
import errno
import gc
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.peers import lingering, nobody_waits_for
from integration.watches import without_watches

from keyd.linux import seccomp
from titus_py.between.event_loop import EventLoop
from titus_py.between.lookups import MAX_OCTETS
from titus_py.between.unprivileged import Malformed
from titus_py.configuration.address import NameAddress
from titus_py.resolver.system_calls import RESOLVING
from titus_py.supervisor import reaping, unprivileged
from titus_py.supervisor.resolver import Resolver
from titus_py.supervisor.unprivileged import UnprivilegedProcess

UID = 2_000_000_011
_PIDFD_GETFD = 438


class Watched:
    def __init__(self) -> None:
        self.loop = EventLoop()
        self.events: list[tuple[str, dict[str, Any]]] = []
        program = seccomp.build(RESOLVING, errno.ENOSYS).hex()
        told = {"uid": UID, "filter": program}
        self.process = UnprivilegedProcess(
            self.loop, self._event, "resolver", lambda: told, MAX_OCTETS
        )

    def _event(self, event: str, level: str = "info", **fields: Any) -> None:
        self.events.append((event, {"level": level, **fields}))

    def run(self, until: Callable[[], object], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        tick = self.loop.after(0.05, lambda: None)
        while not until():
            assert time.monotonic() < deadline
            tick.cancel()
            tick = self.loop.after(0.05, lambda: None)
            self.loop.run_once()

    def pid(self) -> int:
        assert self.process._process is not None
        return self.process._process.pid


def malformed(_: bytes) -> None:
    raise Malformed


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    monkeypatch.setattr(unprivileged, "_ALIVE_SECONDS", 0.1)
    monkeypatch.setattr(unprivileged, "_PAUSE_SECONDS", (0.1, 1.0))
    found = Watched()
    found.process.start()
    try:
        found.run(lambda: found.process.ready)
        yield found
    finally:
        found.process.stop()


def test_one_that_hangs_is_ended_and_started_again(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It says that it is alive.
    heard = watched.process._last_heard
    watched.run(lambda: watched.process._last_heard > heard)
    pid = watched.pid()
    os.kill(pid, signal.SIGSTOP)
    # Not while one starts: on a machine that has much else to do, that takes longer.
    with monkeypatch.context() as impatient:
        impatient.setattr(unprivileged, "_QUIET_SECONDS", 0.2)
        watched.run(lambda: len(watched.events) == 2)
    assert watched.events == [
        ("resolver_hangs", {"level": "alarm", "pid": pid}),
        ("resolver_died", {"level": "alarm", "pid": pid, "how": "killed by SIGKILL"}),
    ]
    watched.run(lambda: watched.process.ready)
    assert watched.pid() != pid


def test_one_that_cannot_be_watched_is_started_again_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For want of a watch. Nothing is left of it, and nothing waits for it for ever."""
    monkeypatch.setattr(unprivileged, "_PAUSE_SECONDS", (0.1, 1.0))
    monkeypatch.setattr(reaping, "_late", [])
    watched = Watched()
    # What other tests have left to the collector is closed now, and not meanwhile.
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    without_watches(watched.process.start, watched.loop._epoll)
    reason = "resolver: No space left on device"
    assert watched.events == [("start_failed", {"level": "error", "reason": reason})]
    assert len(os.listdir("/proc/self/fd")) == before
    (ended,) = reaping._late
    assert not isinstance(ended, int)
    assert ended.wait() == -signal.SIGKILL
    try:
        watched.run(lambda: watched.process.ready)
    finally:
        watched.process.stop()


def test_a_question_for_which_there_is_no_room_is_asked_later(watched: Watched) -> None:
    """net.core.wmem_default may be as low as this."""
    assert watched.process._socket is not None
    watched.process._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    found: set[str] = set()
    resolver = Resolver(watched.loop, watched.process, lambda name, _: found.add(name.name))
    names = {f"127.0.0.{number}" for number in range(1, 21)}
    os.kill(watched.pid(), signal.SIGSTOP)
    resolver.resolve([NameAddress(name, 80) for name in names], 3600)
    os.kill(watched.pid(), signal.SIGCONT)
    watched.run(lambda: found == names)
    assert not watched.events


def mouth(pid: int) -> socket.socket:
    """The only socket that this process has: to the supervisor."""
    (number,) = [
        int(one.name)
        for one in Path(f"/proc/{pid}/fd").iterdir()
        if one.name != "2" and os.readlink(one).startswith("socket:")
    ]
    pidfd = os.pidfd_open(pid)
    taken = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, number, 0)
    os.close(pidfd)
    assert taken >= 0, os.strerror(ctypes.get_errno())
    return socket.socket(fileno=taken)


@pytest.mark.parametrize("heard", [True, False], ids=["heard", "not heard"])
def test_it_cannot_have_the_supervisor_wait_in_closing_its_socket(
    watched: Watched, heard: bool
) -> None:
    """One that lingers: its filter lets it make none, but others may send it one."""
    with mouth(watched.pid()) as speaking:
        side, peer = lingering()
        with peer, nobody_waits_for(peer):
            with side:
                socket.send_fds(speaking, [b"nonsense"], [side.fileno()])
            if heard:
                watched.process.heard = malformed
                watched.run(lambda: watched.events)
                assert watched.events[0][0] == "unintelligible"
            else:
                watched.process.stop()


def test_one_that_talks_nonsense_is_ended(watched: Watched) -> None:
    watched.process.heard = malformed
    pid = watched.pid()
    # As if it had been ready once more, which nobody says.
    watched.process.ready = True
    watched.process._hear_message(b"R")
    watched.run(lambda: len(watched.events) == 2)
    assert [event for event, _ in watched.events] == ["unintelligible", "resolver_died"]
    assert watched.events[0][1] == {"level": "alarm", "process": "resolver", "pid": pid}
