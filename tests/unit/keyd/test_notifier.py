"""What the service manager is told, where its queue is full."""

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

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
