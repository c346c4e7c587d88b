"""Which orders the fork server takes from its parent."""

import os
import socket
import sys
from collections.abc import Iterator

import pytest

from keyd.linux.descriptors import send_descriptors
from titus_py.between.messages import Fork
from titus_py.fork_server.orders import Orders

UIDS = range(1022, 1026)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def order(parent: socket.socket, uid: int) -> None:
    with open(os.devnull) as report:
        send_descriptors(parent, Fork(uid).encode(), [report.fileno(), report.fileno()])


def test_all_orders_that_have_come_are_taken(pair: tuple[socket.socket, socket.socket]) -> None:
    for uid in UIDS:
        order(pair[0], uid)
    orders = Orders(b"", UIDS)
    taken = orders.take(pair[1])
    for given in taken:
        os.close(given.report)
        os.close(given.parent)
    numbers = [int.from_bytes(orders.uid(number), sys.byteorder) for number in range(len(taken))]
    assert numbers == list(UIDS)


@pytest.mark.parametrize("uid", [0, 1021, 1026, 1023 << 32, -1])
def test_no_worker_has_a_uid_that_is_not_for_workers(
    pair: tuple[socket.socket, socket.socket], uid: int
) -> None:
    order(pair[0], uid)
    with pytest.raises(SystemExit, match="is not for workers"):
        Orders(b"", UIDS).take(pair[1])
