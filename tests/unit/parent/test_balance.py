"""In which order backends are tried."""

from collections import Counter
from collections.abc import Sequence
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titus_py.parent.backend import Backend
from titus_py.parent.balance import Balance

HOW = ("round-robin", "priority", "least-connections", "source")
CLIENT = "192.0.2.1"


def backends(count: int) -> list[Backend]:
    return [Backend(f"10.0.0.{number}:80", ()) for number in range(1, count + 1)]


def named(order: Sequence[Backend]) -> list[str]:
    return [backend.name for backend in order]


@given(
    how=st.sampled_from(HOW),
    connections=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    clients=st.lists(st.ip_addresses().map(str), min_size=1, max_size=8),
)
def test_every_backend_is_tried_once(how: str, connections: list[int], clients: list[str]) -> None:
    there = backends(len(connections))
    for backend, count in zip(there, connections, strict=True):
        backend.connections = count
    balance = Balance(how, there)
    for client in clients:
        assert sorted(named(balance.order(client))) == sorted(named(there))


def test_in_turn() -> None:
    balance = Balance("round-robin", backends(3))
    firsts = [balance.order(CLIENT)[0].name for _ in range(6)]
    assert firsts == [f"10.0.0.{number}:80" for number in (1, 2, 3, 1, 2, 3)]


def test_as_listed() -> None:
    balance = Balance("priority", backends(3))
    assert named(balance.order(CLIENT)) == named(balance.order(CLIENT)) == named(backends(3))


def test_the_fewest_connections_first() -> None:
    there = backends(3)
    balance = Balance("least-connections", there)
    for _ in range(30):
        balance.order(CLIENT)[0].connections += 1
    assert [backend.connections for backend in there] == [10, 10, 10]
    there[1].connections = 4
    assert balance.order(CLIENT)[0] is there[1]


def test_a_source_keeps_its_backend_and_sources_are_spread() -> None:
    clients = [str(IPv4Address("192.0.2.0") + number) for number in range(3000)]
    three, again = Balance("source", backends(3)), Balance("source", backends(3))
    chosen = {client: three.order(client)[0].name for client in clients}
    assert chosen == {client: again.order(client)[0].name for client in clients}
    assert all(850 < count < 1150 for count in Counter(chosen.values()).values())
    # Without the second one, its own clients move, to both of the others; no others do.
    two = Balance("source", [one for one in backends(3) if one.name != "10.0.0.2:80"])
    moved = {c: two.order(c)[0].name for c in clients if two.order(c)[0].name != chosen[c]}
    assert {chosen[client] for client in moved} == {"10.0.0.2:80"}
    assert all(count > 400 for count in Counter(moved.values()).values())
    assert len(set(moved.values())) == 2


@pytest.mark.parametrize("how", HOW)
def test_a_backend_that_has_just_failed_comes_last(how: str) -> None:
    there = backends(3)
    balance = Balance(how, there)
    there[0].failed()
    assert {balance.order(CLIENT)[-1].name for _ in range(3)} == {"10.0.0.1:80"}
    there[0].worked()
    there[1].failed()
    assert {balance.order(CLIENT)[-1].name for _ in range(3)} == {"10.0.0.2:80"}
