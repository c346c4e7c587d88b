"""What the service manager is told, where its queue is full."""

import itertools
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from keyd.linux import systemd
from keyd.linux.systemd import Notifier


class Manager:
    """What systemd is to a service. Its queue is the kernel's."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.setblocking(False)

    def fill(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    other.sendto(b"other", self.path)

    def heard(self) -> list[str]:
        """Of this service, without what other services said."""
        found = []
        with suppress(BlockingIOError):
            while True:
                found.append(self.socket.recv(4096).decode())
        return [one for one in found if one != "other"]


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", manager.path)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    with manager.socket:
        yield manager


def test_a_state_is_told_once_there_is_room_and_in_order(manager: Manager) -> None:
    notify = Notifier()
    manager.fill()
    notify(ready=1)
    notify(status="early")
    notify(watchdog=1)
    notify(stopping=1)
    assert manager.heard() == []
    notify(status="late")
    assert manager.heard() == ["READY=1", "STOPPING=1", "STATUS=late"]
    notify(status="latest")
    assert manager.heard() == ["STATUS=latest"]


def test_of_many_states_the_last_are_kept(manager: Manager) -> None:
    notify = Notifier()
    manager.fill()
    for number in range(100):
        notify(ready=1, status=number)
    assert manager.heard() == []
    notify(watchdog=1)
    heard = manager.heard()
    assert heard[-2:] == ["READY=1\nSTATUS=99", "WATCHDOG=1"]
    assert len(heard) < 20


def test_who_has_no_more_to_say_hangs_up_once_it_was_heard(manager: Manager) -> None:
    notify = Notifier()
    manager.fill()
    notify.ready()
    assert manager.heard() == []
    notify(watchdog=1)
    notify(watchdog=1)
    assert manager.heard() == ["READY=1"]


def test_a_manager_that_is_gone_is_told_nothing(manager: Manager) -> None:
    notify = Notifier()
    manager.socket.close()
    notify(ready=1)
    notify(stopping=1)


def test_threads_that_notify_at_once_lose_no_state(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each line of one's call, another one's begins."""
    for line in itertools.count(1):
        monkeypatch.setenv("NOTIFY_SOCKET", manager.path)
        notify = Notifier()
        manager.fill()
        notify(ready=1)
        notify(stopping=1)
        assert manager.heard() == []
        if not call_with_another_at_line(notify, line):
            assert line > 5
            return
        states = [said for said in manager.heard() if said != "WATCHDOG=1"]
        assert states == ["READY=1", "STOPPING=1"]


def call_with_another_at_line(notify: Notifier, number: int) -> bool:
    """Whether the call has so many lines."""
    passed, another = 0, threading.Thread(target=notify, kwargs={"watchdog": 1})

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal passed
        if frame.f_code.co_filename != systemd.__file__:
            return None
        if event == "line":
            passed += 1
            if passed == number:
                another.start()
                # It ends, or waits for this one.
                another.join(0.1)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        notify(watchdog=1)
    finally:
        sys.settrace(before)
    if passed < number:
        return False
    another.join()
    return True
