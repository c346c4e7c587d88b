"""Which addresses a listener takes load balancers from."""

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titus_py.parent.networks import Networks


@st.composite
def networks(draw: st.DrawFn) -> str:
    address = draw(st.ip_addresses())
    return str(ip_network((address, draw(st.integers(1, address.max_prefixlen))), strict=False))


@given(st.lists(networks(), max_size=5), st.ip_addresses())
def test_any_address_in_any_networks(listed: list[str], address: object) -> None:
    """As the standard library finds it."""
    expected = any(address in ip_network(network) for network in listed)
    assert (str(address) in Networks(listed)) == expected


@given(networks())
def test_the_first_and_the_last_of_a_network_and_their_neighbours(network: str) -> None:
    one = ip_network(network)
    there = Networks([network])
    assert str(one[0]) in there
    assert str(one[-1]) in there
    for number in (int(one[0]) - 1, int(one[-1]) + 1):
        if 0 <= number < 1 << one.max_prefixlen:
            assert str(type(one[0])(number)) not in there


@pytest.mark.parametrize(
    ("address", "is_there"),
    [("fe80::1%eth0", True), ("fe81::1%eth0", False), ("10.1.2.3", True), ("0a01::", False)],
)
def test_interfaces_and_families(address: str, is_there: bool) -> None:
    assert (address in Networks(["fe80::/16", "10.0.0.0/8"])) == is_there
    assert ip_address(address.partition("%")[0])


def test_unix_sockets_are_nobodys_network() -> None:
    """Who may connect to one is for its file's mode to say."""
    client = "unix:uid=1000,pid=4711"
    assert client in Networks(["unix"])
    assert client not in Networks(["10.0.0.0/8"])
    assert "127.0.0.1" not in Networks(["unix"])
