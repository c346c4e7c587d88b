"""What a parent says of its clients, with a socket to the supervisor that has more or less room."""

import socket
import time
from types import SimpleNamespace
from typing import cast

import pytest

from titus_py.between.client_allow import Facts
from titus_py.between.client_identity import Identity, Link
from titus_py.between.event_loop import EventLoop
from titus_py.parent.claims import tell_claims
from titus_py.parent.connections import Connections
from titus_py.parent.outbox import MESSAGE_OCTETS, Outbox
from titus_py.parent.worker import Worker
from titus_py.supervisor.child_events import decode

SPKI = bytes([1]) * 32
#: Names may have 8 KiB in a worker's message. Each of these octets takes six in the supervisor's.
LONGEST = Identity(
    Facts(("\x01" * 8189,), (), (), SPKI.hex()),
    tuple(Link(SPKI, (1 << 160) - 1, SPKI) for _ in range(8)),
    b"",
)
ALICE = Identity(Facts(("alice.example.org",), (), (), SPKI.hex()), (Link(SPKI, 1, SPKI),), b"")


def told(identities: list[Identity | None], buffer: int | None = None) -> list[Identity | None]:
    """What the supervisor hears of connections with these clients, and in what order."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        if buffer is not None:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        loop = EventLoop()
        outbox = Outbox(loop, ours)
        busy = {}
        for number, identity in enumerate(identities):
            worker = Worker(number, -1, ours)
            worker.connection, worker.vhost, worker.identity = number, 0, identity
            busy[number] = worker
        connections = cast(Connections, SimpleNamespace(handshaking={}, busy=busy))
        asked = time.monotonic_ns()
        order = {"do": "claims", "asked": asked, "vhosts": [0]}
        tell_claims(connections, order, outbox.put, outbox.room)
        heard = []
        while True:
            try:
                message = theirs.recv(MESSAGE_OCTETS, socket.MSG_DONTWAIT)
            except BlockingIOError:
                loop.run_once()
                continue
            for name, fields, _ in decode("parent", message, []):
                assert fields["asked"] == asked
                if name == "claims_told":
                    assert fields["count"] == len(heard) == len(identities)
                    return heard
                assert name == "claims"
                for connection, vhost, claim in fields["claims"]:
                    assert (connection, vhost) == (len(heard), 0)
                    heard.append(claim and Identity.from_claim(claim))


def test_all_of_them() -> None:
    clients = [ALICE, None, LONGEST, LONGEST, ALICE] * 3
    assert told(clients) == clients


@pytest.mark.parametrize("buffer", [1, 2500, 10_000])
def test_names_for_which_there_is_no_room_let_nobody_in(buffer: int) -> None:
    """net.core.wmem_default may be as low as this. No other client is left out for that."""
    clients = [ALICE, None, LONGEST] * 30
    heard = told(clients, buffer)
    assert heard[0::3] == clients[0::3]
    assert heard[1::3] == clients[1::3]
    for one in heard[2::3]:
        assert one is not None
        assert (one.complete, one.facts.spki) == (False, SPKI.hex())


def test_an_earlier_programs_supervisor_hears_what_it_knows() -> None:
    heard = []
    connections = cast(Connections, SimpleNamespace(handshaking={}, busy={}))
    order = {"do": "claims", "vhosts": [0]}
    tell_claims(connections, order, lambda event, **fields: heard.append((event, fields)), 1000)
    assert heard == [("claims", {"claims": []}), ("claims_told", {"count": 0})]
