"""The parent's socket to keyd: what keyd said before it ended is heard."""

import socket

from keyd.protocol import Done, Operation, Refusal, Status
from titus_py.between.event_loop import EventLoop
from titus_py.parent.channels import Channels


def test_refusals_are_heard_of_a_keyd_that_ended_with_orders_unread() -> None:
    """An alarm that keyd rang just before it died must not be lost with it."""
    refusal = Refusal(7, Status.NOT_TLS, "a token")
    done = Done(7, Operation.SIGN)
    heard: list[Refusal | Done] = []
    told: list[str] = []
    loop = EventLoop()
    channels = Channels(
        loop, lambda event, *_, **__: told.append(event), heard.append, heard.append
    )
    ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(b"an order that is never read")
    channels.take([ours.detach()])
    keyds.send(refusal.encode())
    keyds.send(done.encode())
    keyds.close()
    while not told:
        loop.run_once()
    assert heard == [refusal, done]
    assert told == ["keyd_lost"]
    assert not channels.there


def test_what_keyd_has_said_so_far_is_heard_when_it_is_asked_for() -> None:
    """Before a connection's end is judged: without another turn of the loop."""
    heard: list[Refusal | Done] = []
    channels = Channels(EventLoop(), lambda *_, **__: None, heard.append, heard.append)
    ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channels.take([ours.detach()])
    channels.catch_up()
    said = [Done(7, Operation.SIGN), Refusal(8, Status.NOT_TLS, "a token"), Done(9, Operation.SIGN)]
    for message in said:
        keyds.send(message.encode())
    channels.catch_up()
    assert heard == said
    keyds.close()
    channels.catch_up()
    assert heard == said


def test_a_keyd_that_goes_on_talking_keeps_the_parent_from_nothing() -> None:
    """Each message that is heard is followed by another one."""
    said = Done(7, Operation.SIGN)
    heard: list[Refusal | Done] = []

    def hear(report: Refusal | Done) -> None:
        heard.append(report)
        if len(heard) < 10_000:
            keyds.send(said.encode())

    channels = Channels(EventLoop(), lambda *_, **__: None, hear, hear)
    ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with keyds:
        channels.take([ours.detach()])
        keyds.send(said.encode())
        channels.catch_up()
    assert 500 < len(heard) < 5000
