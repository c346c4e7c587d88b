"""The parent's workers: ordered, spare, busy, ended. Run by the parent.

The pool decides when to have spares forked, how many, and what to do when forking fails. It reaps
workers that have ended. It trusts the fork server. About a worker that has had a client, it trusts
only the kernel.
"""

import errno
import os
import sys
from collections import deque
from collections.abc import Callable, Sized
from contextlib import suppress

from keyd.linux.descriptors import packet_pair
from keyd.linux.process import how_ended
from titus_py.between.event_loop import EventLoop, Timer
from titus_py.between.messages import Forked
from titus_py.between.plan import Plan
from titus_py.between.report import make_report, read_report
from titus_py.parent.forks import Forks
from titus_py.parent.outbox import Tell
from titus_py.parent.worker import KILLED, Worker

__all__ = ["Pool"]

_FORK_PAUSE_SECONDS = (0.1, 5.0)
#: How long forking is put off, so that the client that just got a worker is served first.
_SPARES_SECONDS = 0.02
#: How many workers in a row may fail to confine themselves: then the parent gives up.
_MAX_FAILED_WORKERS = 5
#: How often a worker is seen that has no client and is no spare, before it is taken to hang: for
#: 15 seconds, as ``look_after`` is called every 3. On a busy machine, workers may take a few.
_LOOKS = 6
_HANGS = "hung before it had a client"
#: How often a worker is seen that was killed, or cannot be reaped, before that is told: for six
#: seconds or more. SIGKILL ends a process only once the kernel lets it return from its system call.
_LOOKS_AFTER_END = 3
_NOT_WATCHED = "no descriptor was left to watch it by"
#: How often to hear a worker that has ended: our code says four things at most. Besides, there may
#: be a reset, and is the end of file.
_LAST_WORDS = 6


class Pool:
    """``waiting`` are the clients that wait for a worker. Only whether there are any matters.

    ``heard`` is called when a worker's socket can be read. ``ended`` is called when a worker that
    had a client has ended: with how it ended, or an empty text if it exited as it should.
    """

    def __init__(
        self,
        loop: EventLoop,
        plan: Plan,
        forks: Forks,
        waiting: Sized,
        tell: Tell,
        heard: Callable[[Worker], None],
        ended: Callable[[Worker, str], None],
    ) -> None:
        self._loop = loop
        self._plan = plan
        self._forks = forks
        self._waiting = waiting
        self._tell = tell
        self._heard = heard
        self._ended = ended
        # The uid that was freed longest ago is taken first; to begin with, in an order by chance:
        # a worker's uid does not tell how many others there have been.
        self._uids = deque(_shuffled(range(plan.first_uid, plan.last_uid + 1)))
        #: All workers, by uid; and the uids of those that are not ready yet.
        self._workers: dict[int, Worker] = {}
        self._forming: set[int] = set()
        #: Workers that are ready for a client.
        self.spares: deque[Worker] = deque()
        #: Those that are neither spares nor have a client, and how often they were seen so.
        self._idle: dict[Worker, int] = {}
        #: The same of those that were killed, or have ended, and are still there.
        self._leaving: dict[Worker, int] = {}
        #: Those that have ended, and cannot be reaped yet.
        self._traced: set[Worker] = set()
        #: Those without a pidfd, by their pids.
        self._unwatched: dict[int, Worker | None] = {}
        self._draining = False
        self._failed_workers = 0
        self._fork_pause = 0.0
        self._fork_timer: Timer | None = None
        self._spares_timer: Timer | None = None

    def __len__(self) -> int:
        """How many workers there are, in whatever state."""
        return len(self._workers)

    @property
    def coming(self) -> int:
        """How many workers without a client there are, or soon will be."""
        return len(self.spares) + len(self._forming)

    @property
    def stay(self) -> int:
        """How many workers are still there long after they were killed, or have ended."""
        return sum(looks >= _LOOKS_AFTER_END for looks in self._leaving.values())

    def drain(self) -> None:
        """From now on, workers are forked only for clients that wait already."""
        self._draining = True

    def dismiss_spares(self) -> None:
        """End the workers that have no client: none will come for them."""
        self.spares.clear()
        for worker in self._workers.values():
            if worker.offer is None:
                worker.hang_up()
        self._forks.finish()

    def kill_all(self, reason: str) -> None:
        self.forget_unforked()
        for worker in list(self._workers.values()):
            worker.kill(reason)

    def look_at_spares(self) -> None:
        """Once half of the spares are used up, have as many forked as are missing, in a row.

        Forking takes processor time from clients. So it is put off for a moment, while the client
        that got the last spare is served, unless a client waits or few spares are left.
        """
        left = self.coming
        if left > self._plan.spare_workers // 2 or not self._may_fork():
            return
        if self._waiting or left <= self._plan.spare_workers // 4:
            self._fork_spares()
        elif self._spares_timer is None:
            self._spares_timer = self._loop.after(_SPARES_SECONDS, self._fork_spares)

    def may_serve(self, worker: Worker) -> None:
        """Make a worker a spare once it has been forked and has said that it is confined.

        The two may come in either order.
        """
        if worker.ready and worker.pidfd >= 0:
            self._failed_workers = 0
            self._forming.discard(worker.uid)
            self.spares.append(worker)

    def look_after(self) -> None:
        """Kill workers that should have said long ago that they are ready, or have left.

        To be called every few seconds. The calls are counted, and not the time: a worker is not to
        blame if this process was stopped itself (SIGSTOP, a paused virtual machine).
        """
        for pid, worker in list(self._unwatched.items()):
            self._reap_unwatched(worker, pid)
        for worker in list(self._traced):
            self._bury(worker)
        spares = set(self.spares)
        idle, leaving = self._idle, self._leaving
        self._idle, self._leaving = {}, {}
        for worker in self._workers.values():
            if worker.killed_for or worker in self._traced:
                self._leaving[worker] = leaving.get(worker, 0) + 1
            elif worker.pidfd >= 0 and worker.offer is None and worker not in spares:
                self._idle[worker] = idle.get(worker, 0) + 1
        for worker, looks in self._idle.items():
            if looks >= _LOOKS:
                worker.kill(_HANGS)
        for worker, looks in self._leaving.items():
            if looks == _LOOKS_AFTER_END:
                self._stays(worker)

    def _stays(self, worker: Worker) -> None:
        """A worker was killed, and does not end, or has ended, and its tracer has not asked how.

        Tell it, once, and go on without it. Another one takes its place among the spares. It still
        counts among all workers, of which there are never more than the configuration allows: so
        processes do not pile up.
        """
        self._forming.discard(worker.uid)
        why = worker.killed_for
        if worker in self._traced:
            # /proc is not open to this process.
            why = f"ended for its tracer only: see TracerPid in /proc/{worker.pid}/status"
        self._tell(
            "worker_stays",
            level="error",
            uid=worker.uid,
            connection=worker.connection or None,
            why=why,
        )

    # --- forking ------------------------------------------------------------------------

    def _fork_spares(self) -> None:
        if self._spares_timer is not None:
            self._spares_timer.cancel()
            self._spares_timer = None
        try:
            while self._may_fork():
                self._fork()
        except OSError as error:
            self._fork_failed(str(error.strerror))

    def _may_fork(self) -> bool:
        """Whether a spare is missing, and another worker is possible."""
        room = self._plan.max_workers + self._plan.spare_workers - len(self._workers)
        return (
            (not self._draining or bool(self._waiting))
            and self._fork_timer is None
            and self.coming < self._plan.spare_workers
            and room > 0
            and bool(self._uids)
            and not self._forks.busy
        )

    def _fork_failed(self, reason: str) -> None:
        shortest, longest = _FORK_PAUSE_SECONDS
        if not self._fork_pause:
            self._tell("fork_failed", level="error", reason=reason)
        self._fork_pause = min(max(shortest, self._fork_pause * 2), longest)
        if self._fork_timer is None:
            self._fork_timer = self._loop.after(self._fork_pause, self._fork_again)

    def _fork_again(self) -> None:
        self._fork_timer = None

    def _fork(self) -> None:
        """Order a worker; ``forked`` is called with the result. Raises OSError."""
        ours, workers = packet_pair()
        ours.setblocking(False)
        report, watched = -1, False
        try:
            report = make_report()
            uid = self._uids[0]
            worker = Worker(uid, report, ours)
            self._loop.watch(ours.fileno(), lambda: self._heard(worker))
            watched = True
            self._forks.order(uid, report, workers.fileno())
        except OSError:
            if watched:
                self._loop.unwatch(ours.fileno())
            if report >= 0:
                os.close(report)
            ours.close()
            raise
        finally:
            workers.close()
        self._uids.popleft()
        self._workers[uid] = worker
        self._forming.add(uid)

    def forked(self, forked: Forked, pidfd: int) -> None:
        """Take the result of an order; ``pidfd`` is -1 if there is none."""
        worker = self._workers.get(forked.uid)
        if worker is None:
            # The worker was forgotten meanwhile. It sees end-of-file on its socket, and leaves.
            if pidfd >= 0:
                self._reap_later(forked.pid, pidfd)
            return
        worker.pid = forked.pid
        if forked.error:
            self._forget(worker)
            os.close(worker.report)
            self._fork_failed(os.strerror(forked.error))
            return
        if problem := self._watch(worker, pidfd):
            # A spare that cannot be watched is of no use. Nor can it be killed: kill(2) is not for
            # a process that hears workers (``system_calls``).
            worker.hang_up()
            worker.kill(_NOT_WATCHED)
            self._forming.discard(worker.uid)
            self._fork_failed(problem)
            self._unwatched[forked.pid] = worker
            return
        if self._fork_pause:
            self._fork_pause = 0.0
            self._tell("fork_works_again", level="warning")
        if worker.killed_for:
            worker.kill(worker.killed_for)
            return
        self.may_serve(worker)

    def _watch(self, worker: Worker, pidfd: int) -> str:
        """Hear of its end from now on. Returns why that cannot be, or an empty text."""
        if pidfd < 0:
            # No descriptor was left to receive it.
            return os.strerror(errno.EMFILE)
        try:
            self._loop.watch(pidfd, lambda: self._bury(worker))
        except OSError as error:
            os.close(pidfd)
            return os.strerror(error.errno or errno.ENOMEM)
        worker.pidfd = pidfd
        return ""

    # --- their end ----------------------------------------------------------------------

    def _bury(self, worker: Worker) -> None:
        """Note how a worker ended, and take back what it had."""
        for _ in range(_LAST_WORDS):
            # What it said comes before its end, also if both are noticed at once.
            if worker.socket.fileno() < 0:
                break
            self._heard(worker)
        if worker.offer is None:
            with suppress(ValueError):
                self.spares.remove(worker)
        if worker not in self._traced:
            self._loop.unwatch(worker.pidfd)
        status = os.waitid(os.P_PIDFD, worker.pidfd, os.WEXITED | os.WNOHANG)
        if status is None:
            # Somebody traces it, is to hear of its end first (ptrace(2)), and may be stopped.
            self._traced.add(worker)
            return
        self._traced.discard(worker)
        os.close(worker.pidfd)
        self._forget(worker)
        how = _how(status)
        if worker.offer is not None:
            self._ended(worker, how)
            return
        # The worker never had a client, so our code wrote its report.
        why = worker.killed_for or read_report(worker.report).detail
        os.close(worker.report)
        if how and (not self._draining or worker.killed_for == _HANGS):
            self._worker_failed(worker, how, why)

    def _worker_failed(self, worker: Worker, how: str, why: str) -> None:
        self._tell("worker_failed", level="alarm", uid=worker.uid, how=how, why=why)
        if how != KILLED:
            self._failed_workers += 1
        if self._failed_workers >= _MAX_FAILED_WORKERS:
            sys.exit("titus-py: workers cannot confine themselves: " + why)
        self._fork_timer = self._fork_timer or self._loop.after(0.1, self._fork_again)

    def _forget(self, worker: Worker) -> None:
        """Forget a worker that has ended, or never began, and free its uid.

        Its pid namespace has ended with it, so no process has that uid.
        """
        if worker.socket.fileno() >= 0:
            self._loop.unwatch(worker.socket.fileno())
            worker.socket.close()
        del self._workers[worker.uid]
        self._forming.discard(worker.uid)
        self._uids.append(worker.uid)

    def forget_unforked(self) -> None:
        """Forget workers that may never be forked. One that is sees end-of-file, and leaves."""
        for worker in [one for one in self._workers.values() if one.pidfd < 0]:
            self._forget(worker)
            os.close(worker.report)

    def _reap_later(self, pid: int, pidfd: int) -> None:
        """Reap one that was forgotten."""
        try:
            self._loop.watch(pidfd, lambda: self._reap_forgotten(pid, pidfd))
        except OSError:
            os.close(pidfd)
            self._unwatched[pid] = None

    def _reap_forgotten(self, pid: int, pidfd: int) -> None:
        self._loop.unwatch(pidfd)
        os.close(pidfd)
        # If it is traced, it can be reaped later.
        self._unwatched[pid] = None
        self._reap_unwatched(None, pid)

    def _reap_unwatched(self, worker: Worker | None, pid: int) -> None:
        """Reap a spare that was told to leave. Until then, no other process gets its pid.

        ``worker`` is None if it was forgotten.
        """
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
        if status is None:
            return
        del self._unwatched[pid]
        if worker is None or self._workers.get(worker.uid) is not worker:
            return
        self._forget(worker)
        why = read_report(worker.report).detail or worker.killed_for
        os.close(worker.report)
        how = _how(status)
        if how and not self._draining:
            self._worker_failed(worker, how, why)


def _shuffled(uids: range) -> list[int]:
    chance = os.urandom(8 * len(uids))
    return sorted(uids, key=lambda uid: chance[8 * (uid - uids[0]) :][:8])


def _how(status: os.waitid_result) -> str:
    """How a process ended, or nothing where it exited as it should."""
    if status.si_code == os.CLD_EXITED:
        return how_ended(status.si_status) if status.si_status else ""
    return how_ended(-status.si_status)
