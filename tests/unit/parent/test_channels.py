"""The parent's socket to keyd: what keyd said before it ended is heard."""

import socket

from keyd.protocol import Refusal, Status
from titus_py.between.event_loop import EventLoop
from titus_py.parent.channels import Channels


def test_refusals_are_heard_of_a_keyd_that_ended_with_orders_unread() -> None:
    """An alarm that keyd rang just before it died must not be lost with it."""
    refusal = Refusal(7, Status.NOT_TLS, "a token")
    heard: list[Refusal] = []
    told: list[str] = []
    loop = EventLoop()
    channels = Channels(loop, lambda event, *_, **__: told.append(event), heard.append)
    ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(b"an order that is never read")
    channels.take([ours.detach()])
    keyds.send(refusal.encode())
    keyds.close()
    while not told:
        loop.run_once()
    assert heard == [refusal]
    assert told == ["keyd_lost"]
    assert not channels.there
