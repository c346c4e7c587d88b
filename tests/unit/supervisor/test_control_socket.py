"""The control socket is heard in the end, whatever there was no room for."""

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from integration.watches import without_watches

from titus_py.between.event_loop import EventLoop
from titus_py.supervisor import control
from titus_py.supervisor.control import Answer, Control, control_path
from titus_py.supervisor.control_client import ask


def say(answer: Answer) -> None:
    answer({"said": True})


def test_a_socket_that_could_not_be_watched_is_watched_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "CONTROL_DIRECTORY", tmp_path)
    loop = EventLoop()
    ours = without_watches(lambda: Control(loop, {"say": say}), loop._epoll)
    path = control_path(os.getpid())

    def ask() -> dict[str, object]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(path))
            client.send(json.dumps({"do": "say"}).encode())
            client.setblocking(False)
            while True:
                loop.run_once()
                try:
                    return dict(json.loads(client.recv(1000)))
                except BlockingIOError:
                    continue

    assert ask() == {"said": True}
    path.unlink()
    assert without_watches(ours.look_after, loop._epoll)
    path.unlink()
    # Not watched yet, and removed again.
    assert ours.look_after()
    assert ask() == {"said": True}
    ours.close()
    assert not path.exists()


def test_one_client_that_cannot_be_watched_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there may be: none of them takes a place."""
    monkeypatch.setattr(control, "CONTROL_DIRECTORY", tmp_path)
    loop = EventLoop()
    ours = Control(loop, {"say": say})
    for _ in range(20):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(control_path(os.getpid())))
            without_watches(loop.run_once, loop._epoll)
            assert client.recv(1) == b""
    assert not ours._clients
    ours.close()


def test_one_that_waits_for_another_program_is_answered_unwatched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "CONTROL_DIRECTORY", tmp_path)
    loop = EventLoop()
    ours = Control(loop, {})
    client, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with client:
        say(without_watches(lambda: ours.adopt(theirs), loop._epoll))
        assert json.loads(client.recv(1000)) == {"said": True}
        assert client.recv(1) == b""
    ours.close()


@pytest.mark.parametrize("most", [1, 1 << 30])
def test_an_answer_that_is_too_long_for_a_packet_comes_as_a_file(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the status of many virtual hosts; also where net.core.wmem_max is small."""
    monkeypatch.setattr(control, "CONTROL_DIRECTORY", tmp_path)
    monkeypatch.setattr(control, "_ANSWER_OCTETS", most)
    long: dict[str, object] = {"said": "x" * 9_000_000}
    loop = EventLoop()
    ours = Control(loop, {"say": lambda answer: answer(long)})
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, os.getpid(), {"do": "say"}, 60, tmp_path)
        while not asked.done():
            loop.run_once(wait=False)
    assert asked.result() == long
    ours.close()
