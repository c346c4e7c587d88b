"""Messages with descriptors, received without waiting."""

import errno
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from keyd.linux.descriptors import packet_pair, receive_if_any, send_descriptors

Pair = tuple[socket.SocketType, socket.SocketType]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = packet_pair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_nothing_yet_is_not_the_end(pair: Pair) -> None:
    ours, theirs = pair
    assert receive_if_any(ours, 100, 1) is None
    theirs.close()
    assert receive_if_any(ours, 100, 1) == (b"", [])


def test_what_was_said_before_the_end_comes_before_it(pair: Pair) -> None:
    """Also where the other end has not read everything: the kernel tells of that first."""
    ours, theirs = pair
    ours.send(b"never read")
    theirs.send(b"the last words")
    theirs.close()
    assert receive_if_any(ours, 100, 1) == (b"the last words", [])
    assert receive_if_any(ours, 100, 1) == (b"", [])


class Scarce(socket.SocketType):
    """One that cannot receive, for once."""

    error: int | None

    def recvmsg(self, *arguments: int) -> Any:
        error, self.error = self.error, None
        if error is not None:
            raise OSError(error, os.strerror(error))
        return super().recvmsg(*arguments)


@pytest.mark.parametrize(
    ("error", "said"), [(errno.ENOMEM, None), (errno.ENOBUFS, None), (errno.EIO, (b"", []))]
)
def test_a_machine_that_is_short_of_memory_is_not_the_end(
    pair: Pair, error: int, said: tuple[bytes, list[int]] | None
) -> None:
    ours, theirs = pair
    scarce = Scarce(ours.family, ours.type, ours.proto, ours.detach())
    scarce.error = error
    theirs.send(b"said")
    assert receive_if_any(scarce, 100, 1) == said
    assert receive_if_any(scarce, 100, 1) == (b"said", [])
    scarce.close()


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_no_more_descriptors_come_than_there_are_to_be(pair: Pair, count: int) -> None:
    ours, theirs = pair
    send_descriptors(theirs, b"x", [0, 0, 0, 0])
    said = receive_if_any(ours, 100, count)
    assert said is not None
    message, descriptors = said
    for one in descriptors:
        os.close(one)
    assert (message, len(descriptors)) == (b"x", count)
