"""The parent's end of one worker: what it was given, and how to end it. Run by the parent."""

import signal
import time
from contextlib import suppress
from socket import SHUT_RDWR, SocketType
from typing import TYPE_CHECKING, NamedTuple

from keyd.linux.process import how_ended
from keyd.protocol import GrantSet
from titus_py.between import messages
from titus_py.between.event_loop import Timer
from titus_py.between.messages import Ends
from titus_py.parent.backend import Backend
from titus_py.parent.failover import Failover

if TYPE_CHECKING:
    from titus_py.between.client_identity import Identity

__all__ = ["KILLED", "Offer", "Worker"]

#: How a worker ends that is killed: by its parent, or by the kernel where memory runs out.
KILLED = how_ended(-signal.SIGKILL)
_NO_ENDS = Ends("", 0, "", 0)


class Offer(NamedTuple):
    """What a client that came to one local address may have."""

    vhosts: tuple[int, ...]
    grants: GrantSet


class Worker:
    """One worker, from the order to fork it until it is reaped. Times are time.monotonic()'s."""

    __slots__ = (
        "address",
        "awaits_header",
        "backend",
        "backend_ends",
        "balancer",
        "client",
        "client_hello",
        "connection",
        "counted",
        "deadline",
        "dialer",
        "endpoints",
        "ends",
        "forked",
        "identity",
        "inode",
        "killed_for",
        "local",
        "offer",
        "orphaned",
        "pid",
        "pidfd",
        "protocol",
        "ready",
        "report",
        "signed",
        "socket",
        "source",
        "started",
        "tunnel",
        "uid",
        "vhost",
    )

    def __init__(self, uid: int, report: int, end: SocketType) -> None:
        self.uid = uid
        #: 0, and -1, until it has been forked.
        self.pid, self.pidfd = 0, -1
        self.report = report
        self.socket = end
        self.ready = False
        #: Whether keyd has done an operation for it.
        self.signed = False
        #: Whether it gets no other channel than those that it was given: keyd is lost, or refused.
        self.orphaned = False
        #: As keyd was told of it; kept until the handshake is done.
        self.client_hello = b""
        self.connection = 0
        self.address = ""
        #: Whether ``Admission`` has counted that address.
        self.counted = False
        self.client = ""
        #: Whether a load balancer's header is yet to come; the balancer, where that was given one.
        self.awaits_header = False
        self.balancer = ""
        #: Whose connection it is: a load balancer's header may name other ends than its own.
        self.ends = _NO_ENDS
        #: Its own, for the kernel to find it by; None of a unix socket, which has an inode.
        self.endpoints: Ends | None = self.ends
        self.inode = 0
        self.local = ""
        self.forked = time.monotonic()
        self.started = 0.0
        #: None until it has a client.
        self.offer: Offer | None = None
        #: Of ``limits.lifetime``.
        self.deadline: Timer | None = None
        self.dialer: Failover | None = None
        self.backend: Backend | None = None
        #: Of its connection to that backend, the backend's end first; None for a unix socket.
        self.backend_ends: Ends | None = None
        #: Where its backend sees it come from, if that is its client's address.
        self.source: str | None = None
        #: Who its client is, as it says; None where it has not said.
        self.identity: Identity | None = None
        self.killed_for = ""
        #: What its client is for, once the handshake is done.
        self.vhost: int | None = None
        self.protocol: str | None = None
        #: Which tunnel its client is for.
        self.tunnel: int | None = None

    @property
    def known(self) -> int | None:
        """Which of its virtual host's known clients it says that its client is."""
        return self.identity.known if self.identity is not None else None

    def kill(self, reason: str) -> None:
        """Kill the worker. If there are several reasons, the first is logged."""
        self.killed_for = self.killed_for or reason
        # A worker that has not been forked yet is killed by the pool as soon as it is.
        if self.pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def explains(self, how: str) -> bool:
        """Whether it ended as it should (``how`` is empty), or as a process that was killed ends.

        A worker that is about to be killed may still end in another way: it runs on until then.
        """
        return not how or (how == KILLED and bool(self.killed_for))

    def deny_channel(self) -> None:
        """Let it have no other channel to keyd. If it waits for one, it fails now."""
        self.orphaned = True
        # It may have ended meanwhile.
        with suppress(OSError):
            self.socket.send(messages.CHANNEL)

    def hang_up(self) -> None:
        """Let the worker see end-of-file: a spare then leaves by itself."""
        # A worker that has just ended has hung up already.
        with suppress(OSError):
            self.socket.shutdown(SHUT_RDWR)
