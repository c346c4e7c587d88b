"""How many connections a known client gets, and how fast."""

import socket
from types import SimpleNamespace
from typing import cast
from unittest import mock

from titus_py.between.client_allow import Allow, Facts
from titus_py.between.client_identity import ClientTerms, Identity
from titus_py.between.known_client import KnownClient, Rate
from titus_py.between.plan import Plan
from titus_py.parent.identities import Identities
from titus_py.parent.known_clients import KnownClients
from titus_py.parent.worker import Worker

FACTS = Facts((), (), (), "00" * 32)
FEW = KnownClient("few", Allow(spki=("00" * 32,)), (), 2, None)
SLOW = KnownClient("slow", Allow(spki=("11" * 32,)), (), None, Rate(10, 60))
TERMS = ClientTerms(True, "", "", ((), (), (), ()), (FEW, SLOW))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plan(*terms: ClientTerms) -> Plan:
    """With a virtual host for each."""
    return cast(Plan, SimpleNamespace(vhosts=[SimpleNamespace(clients=one) for one in terms]))


def worker(uid: int, known: int | None, vhost: int | None = 0) -> Worker:
    one = Worker(uid, -1, mock.Mock(socket.socket))
    one.vhost = vhost
    one.identity = Identity(FACTS, (), b"", known=known)
    return one


def test_how_many_at_once() -> None:
    clients = KnownClients(plan(TERMS, TERMS))
    assert [clients.admit(worker(uid, 0)) for uid in range(3)] == [None, None, "client_connections"]
    # Each virtual host has its own, and one that was refused is not counted.
    assert clients.admit(worker(4, 0, vhost=1)) is None
    clients.leave(worker(2, 0))
    assert clients.admit(worker(5, 0)) == "client_connections"
    clients.leave(worker(0, 0))
    assert clients.admit(worker(6, 0)) is None
    clients.leave(worker(6, 0))
    clients.leave(worker(6, 0))
    assert [clients.admit(worker(uid, 0)) for uid in (7, 8)] == [None, "client_connections"]


def test_how_fast() -> None:
    clock = Clock()
    clients = KnownClients(plan(TERMS), clock)
    got = [clients.admit(worker(uid, 1)) for uid in range(12)]
    assert got == [None] * 10 + ["client_rate"] * 2
    clock.now += 6.5
    assert [clients.admit(worker(uid, 1)) for uid in (20, 21)] == [None, "client_rate"]
    clock.now += 86_400
    got = [clients.admit(worker(uid, 1)) for uid in range(30, 41)]
    assert got == [None] * 10 + ["client_rate"]


def test_which_claims_are_of_our_code() -> None:
    """A worker names one of the clients that its virtual host knows, or it runs other code."""
    asked = plan(TERMS, TERMS._replace(known=()), TERMS._replace(required=False))
    identities = Identities(asked)

    def allowed(known: int | None, vhost: int) -> bool:
        return identities.allow(worker(1, known, vhost=None), vhost)

    assert [allowed(known, 0) for known in (0, 1, 2, 4000, None)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert [allowed(known, 1) for known in (None, 0)] == [True, False]
    nobody = worker(1, None, vhost=None)
    nobody.identity = None
    assert [identities.allow(nobody, vhost) for vhost in (0, 2)] == [False, True]
    named = worker(1, 1)
    assert identities.name_of(named) == "slow"
    nobody.vhost = 2
    assert (identities.name_of(nobody), identities.admit(nobody)) == (None, None)
