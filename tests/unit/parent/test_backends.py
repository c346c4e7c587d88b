"""Connecting to a virtual host's backend when a worker asks."""

import gc
import os
import socket

import pytest
from unit.between.test_plan import host, plan

from keyd.linux.descriptors import packet_pair
from titus_py.between.event_loop import EventLoop
from titus_py.between.messages import Dial
from titus_py.parent.backends import Backends
from titus_py.parent.dialer import Dialer
from titus_py.parent.failover import Failover
from titus_py.parent.worker import Worker


@pytest.mark.parametrize("answers", [True, False])
def test_nothing_is_left_to_the_collector(answers: bool) -> None:
    """What it would have to free is cold memory for the next connection: a tenth of its cost."""
    with socket.create_server(("127.0.0.1", 0)) as backend:
        address = socket.AF_INET, backend.getsockname()
        if not answers:
            backend.close()
        known = plan(host(None)._replace(backend=("a",)))
        known = known._replace(addresses={"a": (address,)})
        known = known._replace(limits=known.limits._replace(keepalive=60.0))
        loop = EventLoop()
        backends = Backends(loop, known, lambda *_, **__: None)
        ours, workers = packet_pair()
        worker = Worker(1, os.open(os.devnull, os.O_RDONLY), ours)
        gc.collect()
        gc.disable()
        try:
            backends.dial(worker, Dial(0, None))
            answer = workers.recv(256)
            backends.ended(worker)
            os.close(worker.report)
            del worker
            kinds = Worker, Failover, Dialer
            assert not [one for one in gc.get_objects() if type(one) in kinds]
        finally:
            gc.enable()
        assert answer[:1] == (b"B" if answers else b"F")
        for one in (ours, workers):
            one.close()
