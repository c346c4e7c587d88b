"""The pool's workers: those that it cannot watch, for want of a descriptor or a watch."""

import gc
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from integration.tracing import traced
from integration.watches import without_watches

from titus_py.between.event_loop import EventLoop
from titus_py.between.messages import Forked
from titus_py.between.plan import Plan
from titus_py.parent.forks import Forks
from titus_py.parent.pool import Pool


class ForkServer:
    """Takes orders; the processes are this test's."""

    def __init__(self) -> None:
        self.busy = False
        self.orders: list[tuple[int, socket.socket]] = []

    def order(self, uid: int, report: int, end: int) -> None:
        self.orders.append((uid, socket.socket(fileno=os.dup(end))))


class Pooled:
    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.forks = ForkServer()
        plan = cast(
            Plan,
            SimpleNamespace(first_uid=100, last_uid=109, max_workers=5, spare_workers=1),
        )
        self.loop = EventLoop()
        self.pool = Pool(
            self.loop,
            plan,
            cast(Forks, self.forks),
            [],
            lambda event, report=None, **fields: self.told.append((event, fields)),
            lambda worker: None,
            lambda worker, how: None,
        )

    def fork(self) -> None:
        self.pool.look_at_spares()
        ((self.uid, self.end),) = self.forks.orders


@pytest.fixture
def pooled() -> Iterator[Pooled]:
    pooled = Pooled()
    pooled.fork()
    with pooled.end:
        yield pooled


def ends(pooled: Pooled, ending: str) -> None:
    """A worker without a pidfd ends so, once it sees end of file."""
    with subprocess.Popen(["sh", "-c", f"read line; {ending}"], stdin=pooled.end) as worker:
        pooled.pool.forked(Forked(pooled.uid, worker.pid), -1)
        assert [event for event, _ in pooled.told] == ["fork_failed"]
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        pooled.pool.look_after()
        # It was reaped by its number, of which Popen does not know.
        worker.returncode = 0


def test_one_that_leaves_as_it_was_told_to(pooled: Pooled) -> None:
    ends(pooled, "exit 0")
    assert len(pooled.told) == 1
    assert not len(pooled.pool)


def test_one_that_fails(pooled: Pooled) -> None:
    ends(pooled, "kill -SEGV $$")
    assert pooled.told[1:] == [
        (
            "worker_failed",
            {
                "level": "alarm",
                "uid": pooled.uid,
                "how": "killed by SIGSEGV",
                "why": "no descriptor was left to watch it by",
            },
        )
    ]
    assert not len(pooled.pool)


def test_no_worker_is_ordered_whose_socket_cannot_be_watched() -> None:
    pooled = Pooled()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    without_watches(pooled.pool.look_at_spares, pooled.loop._epoll)
    reason = "No space left on device"
    assert pooled.told == [("fork_failed", {"level": "error", "reason": reason})]
    assert not pooled.forks.orders
    assert not len(pooled.pool)
    assert len(os.listdir("/proc/self/fd")) == before
    # It is tried again, and no uid is missing.
    while not pooled.forks.orders:
        pooled.loop.run_once()
        pooled.pool.look_at_spares()
    pooled.forks.orders[0][1].close()
    assert len(pooled.pool._uids) == 9


def test_one_whose_end_cannot_be_watched_is_told_to_leave(pooled: Pooled) -> None:
    with subprocess.Popen(["sh", "-c", "read line; exit 0"], stdin=pooled.end) as worker:
        pidfd = os.pidfd_open(worker.pid)
        forked = Forked(pooled.uid, worker.pid)
        try:
            without_watches(lambda: pooled.pool.forked(forked, pidfd), pooled.loop._epoll)
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        except OSError:
            worker.kill()
            raise
        pooled.pool.look_after()
        # It was reaped by its number, of which Popen does not know.
        worker.returncode = 0
    reason = "No space left on device"
    assert pooled.told == [("fork_failed", {"level": "error", "reason": reason})]
    assert not len(pooled.pool)


def test_one_that_was_forgotten_is_reaped_once_nobody_traces_it(pooled: Pooled) -> None:
    pooled.pool.forget_unforked()
    with subprocess.Popen(["sh", "-c", "read line; exit 0"], stdin=subprocess.PIPE) as worker:
        with traced(worker.pid):
            pooled.pool.forked(Forked(pooled.uid, worker.pid), os.pidfd_open(worker.pid))
            worker.kill()
            while not pooled.pool._unwatched:
                pooled.loop.run_once()
            pooled.pool.look_after()
            assert list(pooled.pool._unwatched) == [worker.pid]
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        pooled.pool.look_after()
        assert not Path(f"/proc/{worker.pid}").exists()
        # It was reaped by its number, of which Popen does not know.
        worker.returncode = 0
    assert not pooled.pool._unwatched
