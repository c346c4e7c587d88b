"""What a worker said before it ended is heard, however soon it ended."""

import signal

from .conftest import Serve
from .instance import PATIENCE, eventually, free_port, zombies
from .peers import Listener, connect, receive_all
from .service import serves


def test_of_a_worker_that_left_a_message_unread(serve: Serve, echoing: Listener) -> None:
    """The end of its socket is a reset then: it had no use for a channel to another keyd."""
    balanced, port = free_port(), free_port()
    instance = serve(
        echoing.address,
        listen=[
            {"address": f"127.0.0.1:{port}"},
            {"address": f"127.0.0.1:{balanced}", "accept_proxy_from": ["127.0.0.0/8"]},
        ],
        worker={"spare": 1, "handshake_timeout": f"{PATIENCE:g}s"},
    )
    instance.expected_alarms.add("keyd_died")
    (worker,) = instance.confined_workers()
    # It has said that it is ready, and waits for a client.
    eventually(lambda: worker.sleeps, "a spare")
    worker.kill(signal.SIGSTOP)
    with connect(balanced) as client:
        client.sendall(b"PROXY TCP4 192.0.2.1 203.0.113.2 56324 443\r\nGET / HTTP/1.1\r\n\r\n")
        # Once there is another spare, this one has the client.
        eventually(lambda: len(instance.workers()) > 1, "another spare")
        since = len(instance.events())
        instance.keyd().kill()
        instance.wait_for_event("keyd_started", since=since)
        # Who comes later gets a channel later.
        assert serves(instance)
        parent = instance.parent()
        parent.kill(signal.SIGSTOP)
        try:
            worker.kill(signal.SIGCONT)
            assert receive_all(client).startswith(b"HTTP/1.1 400 ")
            eventually(lambda: worker.pid in zombies(parent.pid), "it has ended")
        finally:
            parent.kill(signal.SIGCONT)
        failed = instance.wait_for_event("handshake_failed", end="plain_http")
    assert failed["client"] == "192.0.2.1:56324"
    assert instance.events_named("connection_begun", client=failed["client"])
