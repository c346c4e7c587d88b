"""The parent's life: accept clients, have workers forked, hand each a client.

Started anew by the supervisor for each generation of the configuration, as root. Once it has
started its fork server, it has a uid of its own, next to no capability, and a filter. It accepts,
connects to backends and notes how each worker ended. Its fork server makes the workers, which are
the parent's children. It looks at a client's first octets for their lengths, and passes them on to
keyd; it holds no private key and resolves no name.
It trusts the supervisor, the fork server and keyd. It does not trust workers, and understands only
the messages that ``messages`` decodes.
"""

import gc

if __name__ == "__main__":
    # The imports make no garbage, and there are many.
    gc.disable()

import json
import os
import signal
import socket
import sys
from collections import deque

import prctl

from keyd.linux import landlock, seccomp
from keyd.linux.credentials import (
    allow_many_descriptors,
    controllable_speculation,
    forbid_core_dumps,
    hide_memory,
)
from keyd.linux.descriptors import inherited_descriptors, receive_descriptors
from keyd.linux.process import leave
from keyd.linux.sealed import read_all
from keyd.linux.title import set_title
from titus_py.between.event_loop import EventLoop
from titus_py.between.plan import Plan, resolved
from titus_py.fork_server.confinement import (
    PARENT_CAPABILITIES,
    TRANSPARENT_CAPABILITIES,
    missing_features,
)
from titus_py.parent.admission import Admission, LimitsHit
from titus_py.parent.arrival import Arrival
from titus_py.parent.arrivals import Arrivals
from titus_py.parent.backends import Backends
from titus_py.parent.channels import Channels
from titus_py.parent.claims import cut, tell_claims
from titus_py.parent.confinement import confine
from titus_py.parent.connections import Connections
from titus_py.parent.descriptors import connections_within
from titus_py.parent.dialer import MAX_ATTEMPTS
from titus_py.parent.forks import Forks
from titus_py.parent.orphans import Orphans
from titus_py.parent.outbox import Outbox
from titus_py.parent.overstays import Overstays
from titus_py.parent.pool import Pool
from titus_py.parent.worker import Worker

__all__ = ["main"]

#: How often to tell the supervisor that this process is alive.
_ALIVE_SECONDS = 3.0
_SUPERVISOR_MESSAGE_OCTETS = 64 * 1024


class Parent:
    """One generation's listening sockets, workers and socket to keyd."""

    def __init__(
        self, plan: Plan, forks: Forks, supervisor: socket.socket, keyd: int | None
    ) -> None:
        self._plan = plan
        self._forks = forks
        self._supervisor = supervisor
        self._loop = loop = EventLoop()
        self._outbox = Outbox(loop, supervisor)
        self._tell = tell = self._outbox.put
        #: Clients that have no worker yet; the client that came last is last.
        self._waiting: deque[Arrival] = deque()
        admission = Admission(plan.limits)
        self._limits_hit = LimitsHit(loop, tell)
        self._backends = Backends(loop, plan, tell)
        self._connections = Connections(
            loop, plan, admission, self._limits_hit, self._backends, tell
        )
        self._arrivals = Arrivals(
            loop,
            plan,
            self._waiting,
            self._connections,
            self._backends,
            admission,
            self._limits_hit,
            tell,
        )
        self._orphans = Orphans(plan, self._connections.handshaking)
        self._channels = Channels(
            loop, tell, self._connections.refused, self._connections.signed, self._orphans.lost
        )
        self._pool = Pool(loop, plan, forks, self._waiting, tell, self._hear_worker, self._ended)
        self._overstays = Overstays(loop, plan, self._connections, tell)
        self._may_accept = False
        #: The fork server has ended.
        self._crippled = False
        self._draining = False
        self._last_first = True
        if keyd is not None:
            self._channels.take([keyd])

    def withdraw(self) -> None:
        """Report the kernel features that are missing; keep only what serving takes."""
        missing = missing_features(landlock.version(), controllable_speculation())
        for feature in missing:
            self._tell("not_available", level="warning", feature=feature)
        lacking = sorted(set(missing) & set(self._plan.required))
        if lacking:
            sys.exit(f"titus-py: this kernel lacks {' and '.join(lacking)}: see worker.require")
        capabilities = list(PARENT_CAPABILITIES)
        if self._plan.connects_to_unix_sockets and self._plan.backend_groups is None:
            # For unix sockets whose owner and mode do not let root connect.
            capabilities.append(prctl.CAP_DAC_OVERRIDE)
        if self._plan.binds_clients_addresses:
            capabilities += TRANSPARENT_CAPABILITIES
        program = seccomp.Program(bytes.fromhex(self._plan.parent_filter))
        groups = self._plan.backend_groups or ()
        confine(self._plan.parent_uid, groups, capabilities, program)

    def serve(self) -> None:
        """Serve until told to stop and every connection has ended."""
        self._loop.watch(self._supervisor.fileno(), self._hear_supervisor)
        self._forks.watch(self._loop, self._pool.forked, self._cannot_fork)
        self._tell("ready", vhosts=len(self._plan.vhosts), **self._forks.prepared._asdict())
        self._say_alive()
        while not self._draining or len(self._pool) or self._somebody_waits():
            self._pool.look_at_spares()
            self._loop.run_once()
            self._serve_waiting()
            self._adjust_accepting()
        self._arrivals.say_last()
        self._limits_hit.say_last()
        self._outbox.send_last()

    def _somebody_waits(self) -> bool:
        """Whether there are clients that have been accepted and have no worker yet."""
        return bool(self._waiting or self._arrivals.unready)

    def _serve_waiting(self) -> None:
        """Give spares to the client that came last and to the one that came first, in turn.

        In a surge, the client that came last still waits for an answer, or was turned away and
        tries again. Serving the first one as well keeps it from waiting for as long as others
        come. Without a surge there is a spare for every client.
        """
        self._orphans.serve(self._channels)
        while self._pool.spares and self._waiting:
            served = -1 if self._last_first else 0
            if not self._hand_over(self._waiting[served]):
                break
            del self._waiting[served]
            self._last_first = not self._last_first
        if not self._waiting and not (
            self._channels.leaves and self._arrivals.somebody_may_speak()
        ):
            self._channels.done()
        if self._draining and not self._somebody_waits() and self._pool.coming:
            self._pool.dismiss_spares()

    def _hand_over(self, arrival: Arrival) -> bool:
        """Give a client to a spare worker, with a channel to keyd if anything can be signed for it.

        Returns False if no channel can be opened now.
        """
        tunnels = self._arrivals.tunnels
        if tunnels is not None and arrival.tunnel is not None and arrival.server is not None:
            offer = tunnels.offer(arrival.tunnel)
            sockets: list[socket.SocketType] = [arrival.client, arrival.server]
        else:
            offer = self._connections.offer(arrival.local_address, arrival.local_port)
            sockets = [arrival.client]
        channel = None
        if offer.grants.grants:
            number, lifetime = self._connections.next_number, self._plan.handshake_timeout
            hello = arrival.client_hello
            channel = self._channels.open(number, offer, lifetime, hello, sockets)
            if channel is None:
                # keyd is gone or busy, or no descriptor is left: this client waits.
                return False
        worker = self._pool.spares.popleft()
        self._connections.begin(worker, arrival, offer, sockets, channel)
        return True

    def _adjust_accepting(self) -> None:
        self._arrivals.adjust(self._may_accept and self._channels.there and not self._draining)

    def _hear_worker(self, worker: Worker) -> None:
        if self._connections.hear(worker):
            self._pool.may_serve(worker)

    def _ended(self, worker: Worker, how: str) -> None:
        if worker.vhost is None and worker.tunnel is None:
            # What keyd did for it was said before the worker had it.
            self._channels.catch_up()
        self._connections.ended(worker, how)

    def _cannot_fork(self, how: str) -> None:
        """The fork server has ended: accept no more, and keep only clients that can get a worker.

        Clients in the listen queue are for the generation that takes over.
        """
        self._may_accept = False
        self._crippled = True
        self._pool.forget_unforked()
        self._arrivals.keep(self._pool.coming)
        self._tell("fork_server_died", level="alarm", how=how)

    # --- the supervisor -----------------------------------------------------------------

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
                self._channels.take(descriptors)
            case "use backend":
                self._backends.move(order["backend"], resolved(order["addresses"]))
            case "claims":
                self._arrivals.keep(0)
                tell_claims(self._connections, order, self._tell, self._outbox.room)
            case "cut tunnels":
                self._arrivals.keep(0)
                if self._arrivals.tunnels is not None:
                    self._arrivals.tunnels.cut(order["tunnels"])
            case "cut":
                cut(self._connections, order["connections"])
            case "retire":
                self._stop_accepting()
                self._tell("retired")
            case "drain":
                self._stop_accepting()
                self._loop.after(order["seconds"], lambda: self._close_all("drained"))
            case "close":
                self._close_all("closed at once")

    def _stop_accepting(self) -> None:
        """Stop accepting for good, let connections end: another generation takes new clients."""
        self._drain()
        self._arrivals.close()

    def _close_all(self, reason: str) -> None:
        self._drain()
        self._arrivals.keep(0)
        self._pool.kill_all(reason)

    def _drain(self) -> None:
        self._draining = True
        self._backends.retire()
        if self._arrivals.tunnels is not None:
            self._arrivals.tunnels.retire(self._somebody_waits)
        self._pool.drain()
        self._adjust_accepting()

    def _say_alive(self) -> None:
        """Kill what hangs of ours. Tell the supervisor, which kills a parent that hangs."""
        self._forks.look_after()
        self._pool.look_after()
        self._tell("alive", spares=len(self._pool.spares), stay=self._pool.stay)
        self._loop.after(_ALIVE_SECONDS, self._say_alive)


def main() -> int:
    """``python -m titus_py.parent.life``: started by the supervisor, on inherited descriptors."""
    gc.enable()
    given = inherited_descriptors(sys.argv[1:])
    supervisor_fd, keyd_fd = given["--supervisor-fd"], given.get("--keyd-fd")
    set_title("titus-parent", "titus-py: parent")
    prctl.set_pdeathsig(signal.SIGKILL)
    forbid_core_dumps()
    hide_memory()
    descriptors = allow_many_descriptors()
    for descriptor in (supervisor_fd, keyd_fd):
        if descriptor is not None:
            os.set_inheritable(descriptor, False)
    plan = Plan.decode(read_all(os.dup(given["--plan-fd"])))
    # Accept only as many clients as there are descriptors for. The others wait in the listen queue.
    # Each health check may have as many attempts at a time as a connection.
    descriptors -= MAX_ATTEMPTS * len(plan.checks)
    most = connections_within(descriptors, plan.spare_workers)
    plan = plan._replace(max_workers=min(plan.max_workers, most))
    # OpenSSL's configuration is for the fork server, which has OpenSSL.
    forks = Forks(given["--plan-fd"], given["--openssl-conf-fd"], plan.indexes)
    supervisor = socket.socket(fileno=supervisor_fd)
    parent = Parent(plan, forks, supervisor, keyd_fd)
    for index in plan.indexes:
        os.close(index)
    parent.withdraw()
    try:
        forks.wait_until_ready()
    except OSError as error:
        sys.exit(f"titus-py: {error}")
    parent.serve()
    return 0


if __name__ == "__main__":
    leave(main())
