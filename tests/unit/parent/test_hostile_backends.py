"""What a backend on a unix socket leaves in it, where its connection cannot be given away."""

import socket
from types import SimpleNamespace
from typing import Any

import pytest
from integration.peers import lingering, nobody_waits_for

from keyd.linux.descriptors import packet_pair
from titus_py.between.event_loop import EventLoop
from titus_py.parent.backends import Backends

#: As much of one as is looked at here.
PLAN: Any = SimpleNamespace(
    checks=(),
    states=(),
    addresses={},
    vhosts=(),
    connects_to_unix_sockets=True,
    binds_clients_addresses=False,
)


def test_its_worker_has_ended_and_nobody_waits() -> None:
    """Before Linux 6.16, it may have sent descriptors: of TCP sockets that wait for ten minutes."""
    ours, workers = packet_pair()
    workers.close()
    connected, backend = socket.socketpair()
    side, peer = lingering()
    socket.send_fds(backend, [b"x"], [side.fileno()])
    side.close()
    worker: Any = SimpleNamespace(socket=ours)
    with nobody_waits_for(peer):
        Backends(EventLoop(), PLAN, lambda *_, **__: None)._answer(worker, connected, "")
    # It has been closed, with something unread.
    with pytest.raises(ConnectionResetError):
        backend.recv(1)
    for one in (ours, backend, peer):
        one.close()
