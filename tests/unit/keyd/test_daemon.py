"""keyd and its parents: what was said before an end is heard, and what is refused is recorded."""

import socket
import time
from collections.abc import Callable

import pytest

from keyd.daemon import Keyd
from keyd.linux.descriptors import send_descriptors
from keyd.protocol import Open, Operation, Refusal, Status

GRANTS = {bytes(32): frozenset({Operation.SIGN})}


def connected(keyd: Keyd) -> tuple[socket.socket, Callable[[], None], list[None]]:
    """A parent's socket, what keyd does when it can be read, and whether the parent is gone."""
    parent, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gone: list[None] = []
    keyd.hear_parent(ours, lambda: gone.append(None))
    return parent, keyd._sources[ours.fileno()], gone


def open_channel(parent: socket.socket) -> socket.socket:
    worker, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with keyds:
        terms = Open(connection=7, lifetime_ms=60_000, operations=1, grants=GRANTS)
        send_descriptors(parent, terms.encode(), [keyds.fileno()])
    return worker


def refuse_all(keyd: Keyd) -> None:
    for descriptor, channel in list(keyd._channels.items()):
        keyd._answer(descriptor, channel)


def test_a_channel_is_opened_of_a_parent_that_ended_with_refusals_unread() -> None:
    keyd = Keyd({})
    parent, hear, gone = connected(keyd)
    with open_channel(parent) as worker:
        hear()
        worker.send(b"nonsense")
        refuse_all(keyd)
    with open_channel(parent):
        parent.close()
        while not keyd._channels:
            hear()
        assert not gone
        while not gone:
            hear()


def test_what_is_refused_while_keyd_leaves_is_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    """Its parents cannot be told any more."""
    keyd = Keyd({})
    parent, hear, _ = connected(keyd)
    left: list[float] = []
    with parent, open_channel(parent) as worker:
        hear()
        keyd.leave(60, lambda: left.append(time.monotonic()))
        assert parent.recv(100) == b""
        worker.send(b"nonsense")
        refuse_all(keyd)
        assert worker.recv(100)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"keyd: refused, connection 7, {Status.MALFORMED.name}: ")
    assert not left


def test_a_refusal_goes_to_the_parent(capsys: pytest.CaptureFixture[str]) -> None:
    keyd = Keyd({})
    parent, hear, _ = connected(keyd)
    with parent, open_channel(parent) as worker:
        hear()
        worker.send(b"nonsense")
        refuse_all(keyd)
        assert Refusal.decode(parent.recv(1000)).status is Status.MALFORMED
    assert not capsys.readouterr().err
