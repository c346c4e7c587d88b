"""Closing unix sockets in which descriptors were left that make their last holder wait."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from integration.peers import lingering, nobody_waits_for

from titus_py.between.closing import without_waiting
from titus_py.supervisor.lingering import not_lingering


def a_connection(_: Path) -> tuple[socket.socket, socket.socket]:
    """What is to be closed, and the hostile side."""
    return socket.socketpair()


def a_queue(directory: Path) -> tuple[socket.socket, socket.socket]:
    """Nobody has accepted it yet."""
    listener, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    listener.bind(f"{directory}/x")
    listener.listen()
    client.connect(f"{directory}/x")
    return listener, client


Make = Callable[[Path], tuple[socket.socket, socket.socket]]


def leave_descriptors(hostile: socket.socket, count: int) -> list[socket.socket]:
    """TCP sockets that wait for ten minutes; returns their peers."""
    peers = []
    for _ in range(count):
        side, peer = lingering()
        peers.append(peer)
        with side:
            socket.send_fds(hostile, [b"x"], [side.fileno()])
    return peers


@pytest.mark.parametrize("make", [a_connection, a_queue])
def test_closing_waits_for_nobody(make: Make, tmp_path: Path) -> None:
    ours, hostile = make(tmp_path)
    peers = leave_descriptors(hostile, 3)
    with without_waiting():
        ours.close()
    for one in (hostile, *peers):
        one.close()


def test_what_is_closed_afterwards_waits_for_nobody_either() -> None:
    """The supervisor closes a listening socket as a child says, and goes on hearing that child."""
    ours, hostile = a_connection(Path())
    (peer,) = leave_descriptors(hostile, 1)
    with not_lingering():
        with without_waiting():
            pass
        with nobody_waits_for(peer):
            ours.close()
    for one in (hostile, peer):
        one.close()


@pytest.mark.parametrize("make", [a_connection, a_queue])
def test_without_it_closing_takes_as_long_as_the_client_likes(make: Make, tmp_path: Path) -> None:
    ours, hostile = make(tmp_path)
    (peer,) = leave_descriptors(hostile, 1)
    closed = threading.Event()

    def close() -> None:
        os.close(ours.detach())
        closed.set()

    thread = threading.Thread(target=close)
    thread.start()
    assert not closed.wait(0.5)
    # A reset ends the wait.
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()
    assert closed.wait(10)
    thread.join()
    hostile.close()
