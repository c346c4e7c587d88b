"""What a spare does with the time that it has."""

import socket
import threading
from unittest import mock

import pytest
from OpenSSL import SSL

from titus_py.between import messages
from titus_py.between.hand_over import give
from titus_py.between.messages import Client
from titus_py.between.report import ReportWriter
from titus_py.worker import life as worker
from titus_py.worker.life import Site, Terms, serve_next, touch
from titus_py.worker.pump import Pump
from titus_py.worker.tls import client_hello

TERMS = Terms(1.0, None, 1.0, [], b"", ReportWriter(), b"")
PUMP = Pump(TERMS.idle_timeout, TERMS.half_closed_timeout)


def test_one_that_its_parent_has_hung_up_on_is_not_wanted() -> None:
    """The parent could not watch it. It leaves as one that nobody needs: it could be confined."""
    parent, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with parent, end:
        assert worker._wanted(end)
        assert parent.recv(100) == messages.Ready().encode()
        parent.shutdown(socket.SHUT_RDWR)
        assert not worker._wanted(end)


@pytest.mark.parametrize("seconds", [0, 1.0])
def test_only_a_spare_that_nobody_needs_yet_touches_its_pages(seconds: float) -> None:
    """One that is needed at once has better to do."""
    parent, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with parent, mock.patch.object(worker, "touch") as touch:
        leave = threading.Timer(seconds, parent.shutdown, [socket.SHUT_RDWR])
        leave.start()
        if not seconds:
            leave.join()
        assert serve_next(TERMS, socket.SocketType(fileno=end.detach()), PUMP) is None
        leave.join()
    assert touch.called == bool(seconds)


def test_a_spare_that_touches_its_pages_leaves_its_parents_message_where_it_is() -> None:
    """It may come at any moment."""
    parent, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    site = Site(None, SSL.Context(SSL.TLS_SERVER_METHOD), truncated_is_reset=True)
    message = Client((0,)).encode()
    with parent, end:
        parent.send(message)
        touch(TERMS._replace(sites=[site], hello=client_hello()), end, PUMP)
        assert end.recv(len(message) + 1, socket.MSG_DONTWAIT) == message
        with pytest.raises(BlockingIOError):
            parent.recv(1, socket.MSG_DONTWAIT)


def test_a_channel_that_comes_after_the_handshake_is_closed() -> None:
    """There is to be no way to keyd from then on."""
    parent, workers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    keyds, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    backends, backend = socket.socketpair()
    keyds.setblocking(False)
    with parent, workers, keyds, backends:
        give(parent, messages.CHANNEL, [channel])
        give(parent, messages.BACKEND, [backend])
        taken = worker._take_backend(workers)
        try:
            assert keyds.recv(1) == b""
            backends.send(b"octets")
            assert taken.recv(10) == b"octets"
        finally:
            taken.close()
