"""What the supervisor tells its children, however slow they are to hear it; and uids."""

import json
import os
import socket
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titus_py.supervisor.child import Child
from titus_py.supervisor.uid_blocks import free_block


@pytest.fixture
def child_and_ear() -> Iterator[tuple[Child, socket.socket]]:
    """A child that is about to end, and its end of the socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    child = Child("child", subprocess.Popen(["true"]), ours)
    with theirs:
        yield child, theirs
    if ours.fileno() >= 0:
        child.bury()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_slow_child_hears_all_orders_in_order(
    child_and_ear: tuple[Child, socket.socket],
) -> None:
    child, ear = child_and_ear
    orders = [{"do": "use backend", "backend": f"{number}:80"} for number in range(3000)]
    assert [child.queue(order) for order in orders] == [True] + [False] * 2999
    assert not child.send_orders(), "it takes a part of them"
    heard = []
    while True:
        try:
            heard.append(json.loads(ear.recv(4096)))
        except BlockingIOError:
            if child.send_orders() and len(heard) == len(orders):
                break
    assert heard == orders
    assert child.queue({}), "nothing waits any more"


def test_a_descriptor_may_be_closed_once_it_is_queued(
    child_and_ear: tuple[Child, socket.socket],
) -> None:
    child, ear = child_and_ear
    before = descriptors()
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            child.queue({"do": "use keyd"}, [theirs.fileno()])
        assert child.send_orders()
        message, (received,), _, _ = socket.recv_fds(ear, 4096, 1)
        assert json.loads(message) == {"do": "use keyd"}
        os.write(received, b"still open")
        assert ours.recv(64) == b"still open"
        os.close(received)
    assert descriptors() == before


def test_what_nobody_will_hear_is_dropped(child_and_ear: tuple[Child, socket.socket]) -> None:
    child, ear = child_and_ear
    before = descriptors()
    child.queue({"do": "use keyd"}, [ear.fileno()])
    child.queue({"do": "retire"})
    ear.close()
    assert child.send_orders()
    child.queue({"do": "use keyd"}, [0])
    child.bury()
    # Its pidfd and its socket, both ends.
    assert descriptors() == before - 3


BLOCKS = st.lists(
    st.tuples(st.integers(90, 220), st.integers(1, 40)).map(lambda b: range(b[0], b[0] + b[1])),
    max_size=6,
)


@given(BLOCKS, st.integers(1, 60))
def test_a_free_block_is_the_first_that_nobody_has(taken: list[range], count: int) -> None:
    uids = range(100, 200)
    block = free_block(uids, count, taken)
    fitting = [
        range(first, first + count)
        for first in range(uids.start, uids.stop - count + 1)
        if not any(first < one.stop and one.start < first + count for one in taken)
    ]
    assert block == (fitting[0] if fitting else None)
