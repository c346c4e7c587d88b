"""The parent's life: accept clients, have workers forked, hand each a client.

Started anew by the supervisor for each generation of the configuration, as root.
It accepts, connects to backends and notes how each worker ended; its fork server makes
the workers, which are the parent's children. It never reads a client's octet, holds no
key and no certificate, and looks no name up. It trusts the supervisor, the fork server
and keyd, and of what workers say the little that ``messages`` decodes.
"""

import argparse
import errno
import json
import os
import signal
import socket
import sys
import time
from collections import deque
from contextlib import suppress
from functools import lru_cache, partial
from typing import NamedTuple

import prctl

from keyd.linux import landlock
from keyd.linux.credentials import (
    allow_many_descriptors,
    controllable_speculation,
    forbid_core_dumps,
    hide_memory,
    keep_capabilities,
)
from keyd.linux.descriptors import receive_descriptors, send_descriptors
from keyd.linux.process import how_ended
from keyd.linux.sealed import read_all
from keyd.linux.title import set_title
from keyd.protocol import MAX_REFUSAL_OCTETS, Open, Operation, Refusal, Status
from keyd.protocol import Malformed as MalformedByKeyd
from titus_py.between import messages
from titus_py.between.event_loop import EventLoop, Timer
from titus_py.between.hand_over import give
from titus_py.between.messages import Client, Dial, Forked, Ready
from titus_py.between.plan import Plan, resolved
from titus_py.between.report import make_report, read_report
from titus_py.between.virtual_host import applies_to
from titus_py.fork_server.confinement import PARENT_CAPABILITIES, missing_features
from titus_py.parent.admission import Admission
from titus_py.parent.dialer import Dialer
from titus_py.parent.forks import Forks
from titus_py.parent.outbox import Outbox

__all__ = ["main"]

#: How much longer than its handshake timeout a worker may take to act on it itself.
_GRACE = 2.0
#: Why one that takes longer still is ended: it was starved of processor time, or is not ours.
_OVERDUE = "did not keep to its handshake timeout"
_FORK_PAUSE_SECONDS = (0.1, 5.0)
#: How soon to look again for the end of a worker without a pidfd.
_REAP_SECONDS = 0.1
#: How often to say to the supervisor that all is well.
_ALIVE_SECONDS = 3.0
#: How often a limit that is being hit is spoken of.
_LIMITS_SECONDS = 1.0
#: How soon to look again for a keyd that could not take a message.
_KEYD_PAUSE_SECONDS = 0.05
#: How long forking waits for a client to be served who has just been given a worker.
_SPARES_SECONDS = 0.02
#: Workers in a row that fail to confine themselves before the parent gives up.
_MAX_FAILED_WORKERS = 5
_SUPERVISOR_MESSAGE_OCTETS = 64 * 1024
#: How many clients to accept at once from one address before looking after all else again.
_ACCEPT_AT_ONCE = 256


#: What an honest worker may hear as well: that keyd was too slow, that it was started with other
#: keys than its configuration has, that its OpenSSL has failed.
_NOBODYS_FAULT = (Status.EXPIRED, Status.UNKNOWN_KEY, Status.FAILED)


class _Offer(NamedTuple):
    """What a client that came to one local address may have."""

    vhosts: tuple[int, ...]
    grants: dict[bytes, frozenset[Operation]]


class _Arrival(NamedTuple):
    """A client that nobody serves yet."""

    client: socket.socket
    address: str
    port: int
    local_address: str
    local_port: int
    accepted: float


class _Worker:
    """The parent's end of one worker."""

    __slots__ = (
        "address",
        "client",
        "connection",
        "deadline",
        "dialer",
        "forked",
        "killed_for",
        "local",
        "offer",
        "pidfd",
        "ready",
        "report",
        "socket",
        "started",
        "uid",
        "vhost",
    )

    def __init__(self, uid: int, report: int, end: socket.socket) -> None:
        self.uid = uid
        #: -1 until it has been forked.
        self.pidfd = -1
        self.report = report
        self.socket = end
        self.ready = False
        self.connection = 0
        self.address = ""
        self.client = ""
        self.local = ""
        self.forked = time.monotonic()
        self.started = 0.0
        self.offer: _Offer | None = None
        self.deadline: Timer | None = None
        self.dialer: Dialer | None = None
        self.killed_for = ""
        self.vhost: int | None = None


class Parent:
    """One generation's listening sockets, workers and way to keyd."""

    def __init__(
        self, plan: Plan, forks: Forks, supervisor: socket.socket, keyd: socket.socket | None
    ) -> None:
        self._plan = plan
        self._forks = forks
        self._loop = EventLoop()
        self._supervisor = supervisor
        self._outbox = Outbox(self._loop, supervisor)
        self._backends = {number: vhost.addresses for number, vhost in enumerate(plan.vhosts)}
        self._listeners = {
            descriptor: socket.socket(fileno=descriptor) for descriptor in plan.listeners
        }
        self._may_accept = False
        #: Without a fork server.
        self._crippled = False
        self._accepting = False
        self._draining = False
        # The uid that was freed longest ago is taken first.
        self._uids = deque(range(plan.first_uid, plan.last_uid + 1))
        #: By uid: all of them; those that are not ready yet; those that have a client.
        self._workers: dict[int, _Worker] = {}
        self._forming: set[int] = set()
        self._busy: dict[int, _Worker] = {}
        self._spares: deque[_Worker] = deque()
        self._failed_workers = 0
        self._fork_pause = 0.0
        self._fork_timer: Timer | None = None
        self._spares_timer: Timer | None = None
        self._full_told = False
        self._full_timer: Timer | None = None
        # Unique for as long as the machine runs, whatever is restarted and however the
        # wall clock is set.
        self._next_connection = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000
        #: Those who wait for a worker, the latest last.
        self._waiting: deque[_Arrival] = deque()
        self._waiting_timer: Timer | None = None
        self._last_first = True
        self._admission = Admission(plan.limits)
        #: By limit: how often it was hit within this second, and by whom last.
        self._limits_hit: dict[str, tuple[int, str]] = {}
        #: Those whose handshake is not done, the longest-serving first.
        self._handshaking: dict[int, _Worker] = {}
        self._offer = lru_cache(maxsize=1024)(self._make_offer)
        self._keyd: socket.socket | None = None
        if keyd is not None:
            self._take_keyd(keyd)

    # --- life -------------------------------------------------------------------

    def serve(self) -> None:
        """Serve until told to stop, and everybody is gone."""
        self._loop.watch(self._supervisor.fileno(), self._hear_supervisor)
        self._forks.watch(self._loop, self._forked, self._cannot_fork)
        for listener in self._listeners.values():
            listener.setblocking(False)
        self._tell("ready", vhosts=len(self._plan.vhosts))
        self._say_alive()
        while not self._draining or self._workers or self._waiting:
            self._look_at_spares()
            self._loop.run_once()
            self._serve_waiting()
            self._adjust_accepting()
        for limit in list(self._limits_hit):
            self._tell_limited(limit)
        self._outbox.send_last()

    def withdraw(self) -> None:
        """Say what this kernel cannot do for workers, and keep only what serving takes."""
        missing = missing_features(landlock.version(), controllable_speculation())
        for feature in missing:
            self._tell("not_available", level="warning", feature=feature)
        lacking = sorted(set(missing) & set(self._plan.required))
        if lacking:
            sys.exit(f"titus-py: this kernel lacks {' and '.join(lacking)}: see worker.require")
        capabilities = list(PARENT_CAPABILITIES)
        if any(vhost.backend.startswith("unix:") for vhost in self._plan.vhosts):
            # To connect to a socket whose owner and mode do not have root in mind.
            capabilities.append(prctl.CAP_DAC_OVERRIDE)
        keep_capabilities(capabilities)

    def _hear_supervisor(self) -> None:
        try:
            message, descriptors = receive_descriptors(
                self._supervisor, _SUPERVISOR_MESSAGE_OCTETS, 1, socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return
        except ConnectionResetError:
            message, descriptors = b"", []
        if not message:
            # Without a supervisor nobody could stop or replace this parent.
            self._close_all("the supervisor is gone")
            return
        order = json.loads(message)
        match order["do"]:
            case "accept":
                self._may_accept = not self._crippled
            case "use keyd":
                self._take_keyd(socket.socket(fileno=descriptors[0]))
            case "use backend":
                addresses = resolved(order["addresses"])
                self._backends.update(dict.fromkeys(order["vhosts"], addresses))
            case "retire":
                self._stop_accepting()
                self._tell("retired")
            case "drain":
                self._stop_accepting()
                self._loop.after(order["seconds"], lambda: self._close_all("drained"))
            case "close":
                self._close_all("closed at once")

    def _stop_accepting(self) -> None:
        """From now on let connections end: listening is others' business."""
        self._draining = True
        self._adjust_accepting()
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()

    def _dismiss_spares(self) -> None:
        """Nobody is left whom they could serve."""
        self._spares.clear()
        for uid, worker in self._workers.items():
            if uid not in self._busy:
                # One that has just ended has hung up already.
                with suppress(OSError):
                    worker.socket.shutdown(socket.SHUT_RDWR)
        self._forks.finish()

    def _close_all(self, reason: str) -> None:
        self._draining = True
        self._adjust_accepting()
        while self._waiting:
            self._turn_away(self._waiting.popleft())
        self._forget_unforked()
        for worker in list(self._workers.values()):
            self._kill(worker, reason)

    def _say_alive(self) -> None:
        """To the supervisor, which ends a parent that hangs, as this ends a fork server."""
        self._forks.look_after()
        self._tell("alive", spares=len(self._spares))
        self._loop.after(_ALIVE_SECONDS, self._say_alive)

    def _tell(self, event: str, report: int | None = None, **fields: object) -> None:
        """Have the supervisor log something; takes the report over."""
        self._outbox.put(event, report, **fields)

    # --- clients ----------------------------------------------------------------

    def _adjust_accepting(self) -> None:
        """Take clients exactly while there is, or soon will be, somebody to serve them."""
        full = len(self._busy) >= self._plan.max_workers
        if full and not self._full_told:
            self._full_told = True
            self._tell("full", level="warning", max=self._plan.max_workers)
        elif self._full_told and not full and self._full_timer is None:
            self._full_timer = self._loop.after(_LIMITS_SECONDS, self._no_longer_full)
        wanted = bool(self._may_accept and self._keyd and not self._draining and self._has_room())
        if wanted == self._accepting:
            return
        self._accepting = wanted
        for descriptor, listener in self._listeners.items():
            if wanted:
                self._loop.watch(descriptor, partial(self._accept, listener))
            else:
                self._loop.unwatch(descriptor)

    def _no_longer_full(self) -> None:
        """Say so only where it lasts: connections may come and go around the maximum."""
        self._full_timer = None
        if len(self._busy) < self._plan.max_workers:
            self._full_told = False
            self._tell("not_full", level="warning", max=self._plan.max_workers)

    def _has_room(self) -> bool:
        """Beyond the maximum, clients wait in the listen queue."""
        return len(self._busy) + len(self._waiting) < self._plan.max_workers

    def _accept(self, listener: socket.socket) -> None:
        """Take who has come: faster than workers can be forked, so that a surge is soon past."""
        for _ in range(_ACCEPT_AT_ONCE):
            if not self._has_room():
                return
            try:
                client, address = listener.accept()
                local = client.getsockname()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                # EMFILE, ENFILE, ENOBUFS, ENOMEM: it goes on as soon as a worker has ended.
                self._tell("accept_failed", level="error", reason=error.strerror)
                return
            host, port = _plain(address[0]), address[1]
            limit = self._admission.refuse(host)
            if limit is None:
                now = time.monotonic()
                self._wait(_Arrival(client, host, port, _plain(local[0]), local[1], now))
            else:
                client.close()
                self._limited(limit, host)

    def _wait(self, arrival: _Arrival) -> None:
        """Have it wait for a worker. With too many, who has waited longest has to leave.

        Those in their handshake count as well, but are not displaced here: only who gets
        a worker ends another's handshake, and so that takes as long as workers take to fork.
        """
        self._waiting.append(arrival)
        room = self._plan.limits.handshakes - len(self._handshaking)
        if len(self._waiting) > max(room, self._plan.spare_workers):
            oldest = self._waiting.popleft()
            self._turn_away(oldest)
            self._limited("handshakes", oldest.address)
        if self._waiting_timer is None:
            self._waiting_timer = self._loop.after(
                self._plan.handshake_timeout, self._end_long_waits
            )

    def _turn_away(self, arrival: _Arrival) -> None:
        """Reset a connection that has no worker yet."""
        arrival.client.close()
        self._admission.leave(arrival.address)

    def _end_long_waits(self) -> None:
        """Turn away whose handshake cannot be in time any more: keyd may be gone."""
        self._waiting_timer = None
        long_ago = time.monotonic() - self._plan.handshake_timeout
        while self._waiting and self._waiting[0].accepted <= long_ago:
            late = self._waiting.popleft()
            self._turn_away(late)
            self._limited("handshake_timeout", late.address)
        if self._waiting:
            self._waiting_timer = self._loop.after(
                self._waiting[0].accepted - long_ago, self._end_long_waits
            )

    def _serve_waiting(self) -> None:
        """Give the spares to who came last and to who came first, in turn.

        In a surge the last is who still waits for an answer, or was turned away and tries
        again. The others get on as well: nobody waits for as long as others keep coming.
        Without a surge there is a spare for all.
        """
        while self._spares and self._waiting:
            served = -1 if self._last_first else 0
            if not self._hand_over(self._waiting[served]):
                break
            del self._waiting[served]
            self._last_first = not self._last_first
        if self._draining and not self._waiting and (self._spares or self._forming):
            self._dismiss_spares()

    def _limited(self, limit: str, address: str) -> None:
        """Note that a limit was hit: once a second for each, however often it was."""
        if limit not in self._limits_hit:
            self._loop.after(_LIMITS_SECONDS, partial(self._tell_limited, limit))
        count, _ = self._limits_hit.get(limit, (0, ""))
        self._limits_hit[limit] = count + 1, address

    def _tell_limited(self, limit: str) -> None:
        count, address = self._limits_hit.pop(limit)
        self._tell("limited", level="warning", limit=limit, count=count, last_client=address)

    def _hand_over(self, arrival: _Arrival) -> bool:
        """Give a client to a spare worker, together with its channel to keyd, if keyd is there."""
        offer = self._offer(arrival.local_address, arrival.local_port)
        connection = self._next_connection
        sockets = [arrival.client]
        if offer.vhosts:
            channel = self._open_channel(connection, offer)
            if channel is None:
                # keyd is gone, or busy: this client waits.
                return False
            # In this order: the first of them gets the number that the provider knows.
            sockets.insert(0, channel)
        self._next_connection += 1
        if len(self._handshaking) >= self._plan.limits.handshakes:
            # Off the list now, and not when it has ended: the next newcomer ends the next one.
            slowest = self._handshaking.pop(next(iter(self._handshaking)))
            self._kill(slowest, "handshakes_limit")
            self._limited("handshakes", slowest.address)
        worker = self._spares.popleft()
        worker.connection = connection
        worker.address = arrival.address
        worker.client = _text(arrival.address, arrival.port)
        worker.local = _text(arrival.local_address, arrival.local_port)
        worker.offer = offer
        worker.started = time.monotonic()
        worker.deadline = self._loop.after(
            self._plan.handshake_timeout + _GRACE, lambda: self._overdue(worker)
        )
        self._busy[worker.uid] = self._handshaking[worker.uid] = worker
        try:
            give(worker.socket, Client(connection, offer.vhosts).encode(), sockets)
        except OSError as error:
            self._kill(worker, f"does not take a client: {error.strerror}")
        # With the worker on its way already.
        self._tell(
            "connection_begun",
            connection=connection,
            client=worker.client,
            local=worker.local,
            uid=worker.uid,
        )
        return True

    def _make_offer(self, address: str, port: int) -> _Offer:
        vhosts = tuple(
            number
            for number, vhost in enumerate(self._plan.vhosts)
            if applies_to(vhost.local_address, vhost.local_port, address, port)
        )
        grants: dict[bytes, frozenset[Operation]] = {}
        for number in vhosts:
            vhost = self._plan.vhosts[number]
            operations = {Operation.SIGN}
            if vhost.rsa_key_exchange:
                operations.add(Operation.DECRYPT)
            key = bytes.fromhex(vhost.key)
            grants[key] = grants.get(key, frozenset()) | operations
        return _Offer(vhosts, grants)

    def _overdue(self, worker: _Worker) -> None:
        """A worker that has not asked for its backend by now is not going to."""
        self._kill(worker, _OVERDUE)

    # --- keyd -------------------------------------------------------------------

    def _take_keyd(self, keyd: socket.socket) -> None:
        self._lose_keyd()
        keyd.setblocking(False)
        self._keyd = keyd
        self._loop.watch(keyd.fileno(), self._hear_keyd)

    def _lose_keyd(self) -> None:
        if self._keyd is not None:
            self._loop.unwatch(self._keyd.fileno())
            self._keyd.close()
            self._keyd = None

    def _hear_keyd(self) -> None:
        if self._keyd is None:
            return
        try:
            message = self._keyd.recv(MAX_REFUSAL_OCTETS + 1)
        except BlockingIOError:
            return
        except ConnectionResetError:
            message = b""
        if not message:
            self._lose_keyd()
            self._tell("keyd_lost", level="warning")
            return
        try:
            refusal = Refusal.decode(message)
        except MalformedByKeyd as error:
            self._tell("keyd_incomprehensible", level="error", reason=str(error))
            return
        worker = next(
            (worker for worker in self._busy.values() if worker.connection == refusal.connection),
            None,
        )
        level = "error" if refusal.status in _NOBODYS_FAULT else "alarm"
        self._tell(
            "keyd_refused",
            level=level,
            connection=refusal.connection,
            client=worker.client if worker else None,
            uid=worker.uid if worker else None,
            status=refusal.status.name.lower(),
            attempted=refusal.detail,
        )

    def _open_channel(self, connection: int, offer: _Offer) -> socket.socket | None:
        """A worker's way to keyd, on these terms; None if there is none for now."""
        if self._keyd is None:
            return None
        lifetime = int(self._plan.handshake_timeout * 1000)
        terms = Open(connection, lifetime, operations=1, grants=offer.grants)
        try:
            ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            # No number is left for it.
            self._loop.after(_KEYD_PAUSE_SECONDS, lambda: None)
            return None
        with keyds:
            try:
                send_descriptors(self._keyd, terms.encode(), [keyds.fileno()])
            except OSError:
                # Full or gone. If it is alive, it will have caught up in a moment.
                ours.close()
                self._loop.after(_KEYD_PAUSE_SECONDS, lambda: None)
                return None
        return ours

    # --- workers ----------------------------------------------------------------

    def _look_at_spares(self) -> None:
        """Once half of the spares are used up, have as many forked as are missing, in a row.

        After each fork the fork server pays for every page that it writes to: in a row, and
        undisturbed, it writes to few. It does not begin while the client is served to whom the
        last one went, unless there are too few left for that.
        """
        left = len(self._spares) + len(self._forming)
        if left > self._plan.spare_workers // 2 or not self._may_fork():
            return
        if self._waiting or left <= self._plan.spare_workers // 4:
            self._fork_spares()
        elif self._spares_timer is None:
            self._spares_timer = self._loop.after(_SPARES_SECONDS, self._fork_spares)

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
        spares = len(self._spares) + len(self._forming)
        room = self._plan.max_workers + self._plan.spare_workers - len(self._workers)
        return (
            (not self._draining or bool(self._waiting))
            and self._fork_timer is None
            and spares < self._plan.spare_workers
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
        """Have a worker forked; ``_forked`` will hear of it. Raises OSError."""
        ours, workers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with workers:
            report = make_report()
            uid = self._uids.popleft()
            try:
                self._forks.order(uid, report, workers.fileno())
            except OSError:
                self._uids.appendleft(uid)
                ours.close()
                os.close(report)
                raise
        ours.setblocking(False)
        worker = _Worker(uid, report, ours)
        self._workers[uid] = worker
        self._forming.add(uid)
        self._loop.watch(ours.fileno(), lambda: self._hear_worker(worker))

    def _forked(self, forked: Forked, pidfd: int) -> None:
        worker = self._workers.get(forked.uid)
        if worker is None:
            # Forgotten meanwhile: it finds that we hung up.
            if pidfd >= 0:
                self._loop.watch(pidfd, lambda: self._reap_forgotten(pidfd))
            return
        if forked.error:
            self._forget(worker)
            os.close(worker.report)
            self._fork_failed(os.strerror(forked.error))
            return
        if pidfd < 0:
            # There was no number left for it. A spare that nobody can watch is of no use.
            with suppress(OSError):
                worker.socket.shutdown(socket.SHUT_RDWR)
            self._fork_failed(os.strerror(errno.EMFILE))
            self._reap_unwatched(worker, forked.pid)
            return
        if self._fork_pause:
            self._fork_pause = 0.0
            self._tell("fork_works_again", level="warning")
        worker.pidfd = pidfd
        self._loop.watch(pidfd, lambda: self._bury(worker))
        if worker.killed_for:
            self._kill(worker, worker.killed_for)
            return
        self._may_serve(worker)

    def _reap_forgotten(self, pidfd: int) -> None:
        self._loop.unwatch(pidfd)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)

    def _reap_unwatched(self, worker: _Worker, pid: int) -> None:
        """A spare that was told to leave; its pid is its own until this has seen its end."""
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is None:
            self._loop.after(_REAP_SECONDS, lambda: self._reap_unwatched(worker, pid))
            return
        if self._workers.get(worker.uid) is worker:
            self._forget(worker)
            os.close(worker.report)

    def _cannot_fork(self, how: str) -> None:
        """The fork server has ended: take nobody any more, and serve whom there is a worker for.

        Who is in the listen queue is for the generation that takes over.
        """
        self._may_accept = False
        self._crippled = True
        self._forget_unforked()
        while len(self._waiting) > len(self._spares) + len(self._forming):
            self._turn_away(self._waiting.popleft())
        self._tell("fork_server_died", level="alarm", how=how)

    def _forget_unforked(self) -> None:
        """Of workers that were ordered, and may never come; one that does finds nobody."""
        for worker in [one for one in self._workers.values() if one.pidfd < 0]:
            self._forget(worker)
            os.close(worker.report)

    def _may_serve(self, worker: _Worker) -> None:
        """Once it has been forked, and has said that it is confined, in whatever order."""
        if worker.ready and worker.pidfd >= 0:
            self._failed_workers = 0
            self._forming.discard(worker.uid)
            self._spares.append(worker)

    def _hear_worker(self, worker: _Worker) -> None:
        try:
            octets = worker.socket.recv(messages.WORKER_MESSAGE_OCTETS)
        except BlockingIOError:
            return
        except ConnectionResetError:
            octets = b""
        if not octets:
            # It has hung up, or ended: the pidfd will tell.
            self._loop.unwatch(worker.socket.fileno())
            worker.socket.close()
            return
        try:
            message = messages.decode_from_worker(octets)
        except messages.Malformed as error:
            self._alarm(worker, "malformed_message", str(error))
            return
        if isinstance(message, Ready) and not worker.ready:
            worker.ready = True
            self._may_serve(worker)
        elif (
            isinstance(message, Dial)
            and worker.offer is not None
            and worker.dialer is None
            and message.vhost in worker.offer.vhosts
        ):
            self._dial(worker, message.vhost)
        else:
            self._alarm(worker, "unexpected_message", str(message))

    def _alarm(self, worker: _Worker, event: str, attempted: str) -> None:
        """A worker did what our code does not do: say so, once, and end it."""
        if worker.killed_for:
            return
        self._tell(
            event,
            level="alarm",
            connection=worker.connection,
            client=worker.client,
            uid=worker.uid,
            attempted=attempted,
        )
        self._kill(worker, event)

    def _dial(self, worker: _Worker, vhost: int) -> None:
        worker.vhost = vhost
        self._handshaking.pop(worker.uid, None)
        if worker.deadline is not None:
            worker.deadline.cancel()
        if self._plan.limits.lifetime is not None:
            worker.deadline = self._loop.after(
                self._plan.limits.lifetime, lambda: self._kill(worker, "lifetime")
            )

        def done(backend: socket.socket | None, reason: str) -> None:
            try:
                if backend is None:
                    worker.socket.send(
                        messages.BACKEND_FAILED + reason.encode(errors="replace")[:255]
                    )
                else:
                    give(worker.socket, messages.BACKEND, [backend])
            except OSError as error:
                # It may have gone in the meantime; then its end is on record already.
                if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EBADF):
                    self._kill(worker, f"does not take its backend: {error.strerror}")
            if backend is None:
                self._tell(
                    "backend_unavailable",
                    level="error",
                    connection=worker.connection,
                    backend=self._plan.vhosts[vhost].backend,
                    reason=reason,
                )

        timeout = self._plan.connect_timeout
        worker.dialer = Dialer(self._loop, self._backends[vhost], timeout, done)
        worker.dialer.start()

    def _kill(self, worker: _Worker, reason: str) -> None:
        worker.killed_for = worker.killed_for or reason
        # One that has not been told of yet is ended as soon as it is.
        if worker.pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)

    def _bury(self, worker: _Worker) -> None:
        """Note how a worker ended, and take back what it had."""
        status = os.waitid(os.P_PIDFD, worker.pidfd, os.WEXITED)
        self._loop.unwatch(worker.pidfd)
        os.close(worker.pidfd)
        if worker.dialer is not None:
            worker.dialer.cancel()
        if worker.deadline is not None:
            worker.deadline.cancel()
        self._forget(worker)
        with suppress(ValueError):
            self._spares.remove(worker)
        how = _how(status) if status is not None else "lost"
        self._handshaking.pop(worker.uid, None)
        if self._busy.pop(worker.uid, None) is not None:
            self._admission.leave(worker.address)
            self._record(worker, how)
        else:
            # It never had a client: what it says is our code's.
            why = read_report(worker.report).detail
            os.close(worker.report)
            if how and not self._draining:
                self._worker_failed(worker, how, why)

    def _forget(self, worker: _Worker) -> None:
        """It has ended, or never began; its namespace ended with it: nobody has its uid."""
        if worker.socket.fileno() >= 0:
            self._loop.unwatch(worker.socket.fileno())
            worker.socket.close()
        del self._workers[worker.uid]
        self._forming.discard(worker.uid)
        self._uids.append(worker.uid)

    def _worker_failed(self, worker: _Worker, how: str, why: str) -> None:
        self._tell("worker_failed", level="alarm", uid=worker.uid, how=how, why=why)
        self._failed_workers += 1
        if self._failed_workers >= _MAX_FAILED_WORKERS:
            sys.exit("titus-py: workers cannot confine themselves: " + why)
        self._fork_timer = self._fork_timer or self._loop.after(0.1, self._fork_again)

    def _record(self, worker: _Worker, how: str) -> None:
        """``how`` it ended where that was not by itself; the rest is in its report."""
        if how and not worker.killed_for:
            level = "alarm"
        else:
            level = "warning" if worker.killed_for == _OVERDUE else "info"
        self._tell(
            "connection_over",
            report=worker.report,
            level=level,
            connection=worker.connection,
            client=worker.client,
            local=worker.local,
            vhost=worker.vhost,
            seconds=round(time.monotonic() - worker.started, 3),
            worker_seconds=round(time.monotonic() - worker.forked, 3),
            end=worker.killed_for or how,
            uid=worker.uid,
        )


def _how(status: os.waitid_result) -> str:
    """How a process ended, or nothing where it exited as it should."""
    if status.si_code == os.CLD_EXITED:
        return how_ended(status.si_status) if status.si_status else ""
    return how_ended(-status.si_status)


def _plain(address: str) -> str:
    """An IPv4 client of a dual-stack socket, by its own address (RFC 4291 §2.5.5.2)."""
    return address.removeprefix("::ffff:") if "." in address else address


def _text(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def main() -> int:
    """``python -m titus_py.parent.life``: started by the supervisor, on inherited descriptors."""
    parser = argparse.ArgumentParser(prog="titus_py.parent.life")
    parser.add_argument("--plan-fd", type=int, required=True)
    parser.add_argument("--supervisor-fd", type=int, required=True)
    parser.add_argument("--keyd-fd", type=int)
    # For the fork server, which has OpenSSL.
    parser.add_argument("--openssl-conf-fd", type=int, required=True)
    arguments = parser.parse_args()
    set_title("titus-parent", "titus-py: parent")
    prctl.set_pdeathsig(signal.SIGKILL)
    forbid_core_dumps()
    hide_memory()
    allow_many_descriptors()
    for descriptor in (arguments.supervisor_fd, arguments.keyd_fd):
        if descriptor is not None:
            os.set_inheritable(descriptor, False)
    plan = Plan.decode(read_all(os.dup(arguments.plan_fd)))
    forks = Forks(arguments.plan_fd, arguments.openssl_conf_fd)
    supervisor = socket.socket(fileno=arguments.supervisor_fd)
    keyd = socket.socket(fileno=arguments.keyd_fd) if arguments.keyd_fd is not None else None
    parent = Parent(plan, forks, supervisor, keyd)
    parent.withdraw()
    if not forks.wait_until_ready():
        sys.exit("titus-py: the fork server did not start: see above")
    parent.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
