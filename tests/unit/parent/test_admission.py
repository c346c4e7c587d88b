"""Whom the parent turns away."""

import ipaddress
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titus_py.between.plan import Limits
from titus_py.parent.admission import Admission
from titus_py.parent.admission import prefix as network_of

ADDRESSES = ["192.0.2.1", "192.0.2.2", "192.0.3.1", "2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def limits(
    address: int | None = None, prefix: int | None = None, second: float | None = None
) -> Limits:
    return Limits(address, prefix, second, 10, None, 60.0, 60.0, None, 500, 600.0)


def network(address: str) -> str:
    bits = 64 if ":" in address else 24
    return str(ipaddress.ip_network(f"{address}/{bits}", strict=False))


# Come (with an address), or the first one leaves, or time passes.
Step = tuple[str, float]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(ADDRESSES), st.just(0.0)),
        st.tuples(st.just("leave"), st.just(0.0)),
        st.tuples(st.just("wait"), st.floats(0.001, 3)),
    ),
    max_size=200,
)
LIMIT = st.one_of(st.none(), st.integers(1, 5))


@given(STEPS, LIMIT, LIMIT, LIMIT)
def test_never_are_there_more_than_the_limits_allow(
    steps: list[Step], address: int | None, prefix: int | None, second: int | None
) -> None:
    clock = Clock()
    admission = Admission(limits(address, prefix, second), clock)
    inside: list[str] = []
    times: list[float] = []
    for what, seconds in steps:
        if what == "wait":
            clock.now += seconds
        elif what == "leave":
            if inside:
                admission.leave(inside.pop(0))
        else:
            by_address, by_network = Counter(inside), Counter(map(network, inside))
            refused = admission.refuse(what)
            if refused == "connections_per_address":
                assert by_address[what] == address
            elif refused == "connections_per_prefix":
                assert by_network[network(what)] == prefix
            elif refused == "connections_per_second":
                assert second is not None
                recent = [time for time in times if time > clock.now - 1]
                assert len(recent) >= 1
            else:
                assert refused is None
                assert address is None or by_address[what] < address
                assert prefix is None or by_network[network(what)] < prefix
                inside.append(what)
                times.append(clock.now)
                if second is not None:
                    # A bucket that holds a second's worth: at most two within any second.
                    assert sum(time > clock.now - 1 for time in times) <= 2 * second
        assert admission._addresses == Counter(inside)
        assert sum(admission._prefixes.values()) == len(inside)
        assert min(admission._addresses.values(), default=1) > 0
        assert min(admission._prefixes.values(), default=1) > 0
    for one in inside:
        admission.leave(one)
    assert not admission._addresses
    assert not admission._prefixes


@given(st.ip_addresses(), st.ip_addresses())
def test_the_prefix_is_the_one_that_the_addresses_share(
    one: ipaddress.IPv4Address | ipaddress.IPv6Address,
    other: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    same = network(str(one)) == network(str(other))
    assert (network_of(str(one)) == network_of(str(other))) == same


@given(st.ip_addresses(v=6), st.integers(0, 2**64 - 1))
def test_all_of_a_64_have_one_prefix(one: ipaddress.IPv6Address, tail: int) -> None:
    neighbour = ipaddress.IPv6Address(int(one) >> 64 << 64 | tail)
    assert network_of(str(one)) == network_of(str(neighbour))
    beyond = ipaddress.IPv6Address(int(neighbour) ^ 1 << 64)
    assert network_of(str(one)) != network_of(str(beyond))


def test_a_zone_is_no_part_of_the_prefix() -> None:
    assert network_of("fe80::1%eth0") == network_of("fe80::2")


def test_no_limits_turn_nobody_away() -> None:
    admission = Admission(limits())
    assert {admission.refuse("192.0.2.1") for _ in range(10_000)} == {None}


@pytest.mark.parametrize("rate", [1, 3, 50])
def test_the_rate_is_what_was_configured_in_the_long_run(rate: int) -> None:
    clock = Clock()
    admission = Admission(limits(second=rate), clock)
    taken = 0
    for _ in range(10_000):
        clock.now += 0.001
        taken += admission.refuse("192.0.2.1") is None
    assert 10 * rate - 1 <= taken <= 11 * rate + 1


def test_who_is_turned_away_for_the_address_uses_up_none_of_the_rate() -> None:
    clock = Clock()
    admission = Admission(limits(address=1, second=2), clock)
    assert admission.refuse("192.0.2.1") is None
    for _ in range(10):
        assert admission.refuse("192.0.2.1") == "connections_per_address"
    assert admission.refuse("192.0.2.2") is None


def test_a_client_that_comes_through_a_balancer_is_counted_once_it_is_known() -> None:
    admission = Admission(limits(address=1, second=2), Clock())
    assert admission.refuse_rate() is None
    assert admission.refuse_rate() is None
    assert admission.refuse_rate() == "connections_per_second"
    assert admission.refuse_address("192.0.2.1") is None
    assert admission.refuse_address("192.0.2.1") == "connections_per_address"
    assert admission.refuse_address("192.0.2.2") is None
    admission.leave("192.0.2.1")
    assert admission.refuse_address("192.0.2.1") is None
