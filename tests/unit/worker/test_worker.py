"""What a spare does with the time that it has."""

import socket
import threading
from unittest import mock

import pytest

from titus_py.between.report import ReportWriter
from titus_py.worker import life as worker
from titus_py.worker.life import Terms, serve_next

TERMS = Terms(1.0, None, 1.0, [], b"", ReportWriter(), b"")


@pytest.mark.parametrize("seconds", [0, 1.0])
def test_only_a_spare_that_nobody_needs_yet_touches_its_pages(seconds: float) -> None:
    """One that is needed at once has better to do."""
    parent, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with parent, mock.patch.object(worker, "_touch") as touch:
        leave = threading.Timer(seconds, parent.shutdown, [socket.SHUT_RDWR])
        leave.start()
        if not seconds:
            leave.join()
        assert serve_next(TERMS, socket.SocketType(fileno=end.detach())) is None
        leave.join()
    assert touch.called == bool(seconds)
