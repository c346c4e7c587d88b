"""One child, made as the fork server makes workers; for what is measured or tested of that."""

import os
import socket
from typing import NamedTuple

from keyd.linux.descriptors import receive_descriptors, send_descriptors
from titus_py.between.messages import FORKED_OCTETS, Fork, Forked
from titus_py.between.report import make_report
from titus_py.fork_server.forking import fork_as_ordered

__all__ = ["Child", "fork_once"]


class Child(NamedTuple):
    """In the caller: the child's pid and pidfd, or an errno. In the child: ``pid`` is 0, and
    ``failed`` is the index of the call that failed, with its errno; it is -1 if none failed.
    """

    pid: int
    pidfd: int
    failed: int
    error: int


def fork_once(flags: int = 0, calls: bytes = b"", uid: int = 0) -> Child:
    """Order a child with this uid, and have it made. Raises ValueError where calls are cut off."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    report = make_report()
    with ours, theirs, socket.socket(socket.AF_UNIX) as end:
        send_descriptors(ours, Fork(uid).encode(), [report, end.fileno()])
        os.close(report)
        ours.shutdown(socket.SHUT_WR)
        in_child = fork_as_ordered(theirs.fileno(), uid, uid, flags, b"", calls, b"", 0, b"")
        if in_child is not None:
            return Child(0, -1, *in_child)
        message, descriptors = receive_descriptors(ours, FORKED_OCTETS, 1)
    forked = Forked.decode(message)
    return Child(forked.pid, descriptors[0] if descriptors else -1, -1, forked.error)
