"""A child that says what it has not to say is ended, with an alarm, and heard no more."""

import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from integration.peers import lingering

from keyd.linux.descriptors import send_descriptors
from titus_py.between.event_loop import EventLoop
from titus_py.between.report import make_report
from titus_py.supervisor.child import Child
from titus_py.supervisor.children import Children
from titus_py.supervisor.generation import Generation

OVER = {
    "event": "connection_over",
    "level": "info",
    "connection": 7,
    "client": "192.0.2.1:50000",
    "local": "192.0.2.2:443",
    "vhost": None,
    "seconds": 1.5,
    "worker_seconds": 2,
    "end": "",
    "uid": 2_100_000_000,
}


class Ear:
    """A supervisor's ear for one child, which is a process that waits."""

    def __init__(self, name: str) -> None:
        ours, self.mouth = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self.child = Child(name, subprocess.Popen(["sleep", "60"]), ours)
        self.alarms: list[dict[str, Any]] = []
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self.how = ""
        self.when_heard: Callable[[], object] = lambda: None
        self.loop = EventLoop()
        self._children = Children(self.loop, self._event, self._hear, self._ended)
        self.generation = cast(
            Generation,
            SimpleNamespace(
                starting=set(),
                certificates={},
                children=[self.child],
                parent=self.child,
                retiring=False,
            ),
        )
        self._children.watch(self.generation, self.child)

    def _event(self, name: str, of_generation: int = 0, **fields: Any) -> None:
        self.alarms.append({"event": name, **fields})

    def _hear(self, _: Generation, child: Child, name: str, event: dict[str, Any]) -> None:
        assert child is self.child
        self.heard.append((name, event))
        self.when_heard()

    def _ended(self, _: Generation, child: Child) -> None:
        self.how = self._children.let_go(child)

    def run_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 30
        self.loop.after(30, lambda: None)
        while not condition():
            assert time.monotonic() < deadline
            self.loop.run_once()

    def say(self, message: object, *descriptors: int) -> None:
        octets = message if isinstance(message, bytes) else json.dumps(message).encode()
        send_descriptors(self.mouth, octets, descriptors)


@pytest.fixture
def ears() -> Iterator[Callable[[str], Ear]]:
    made: list[Ear] = []

    def ear(name: str) -> Ear:
        made.append(Ear(name))
        return made[-1]

    yield ear
    for one in made:
        if not one.how:
            one.child.kill()
            one.child.bury()
        one.mouth.close()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("keyd", {"event": "x", "name": 1}),
        ("keyd", {"event": "connection_begun", "connection": []}),
        ("keyd", {"event": "ready", "keys": "0" * 64, "all_memory_locked": True, "guards": ""}),
        ("keyd", OVER),
        ("parent", b"no JSON"),
        ("parent", {"event": "ready", "vhosts": 1, "huge_pages": 0, "huge_pages_of_code": 0}),
    ],
)
def test_it_is_ended_with_one_alarm_and_heard_no_more(
    ears: Callable[[str], Ear], name: str, said: object
) -> None:
    ear = ears(name)
    ear.say({"event": "alive", "spares": 1} if name == "parent" else {"event": "alive"})
    for _ in range(3):
        ear.say(said)
    ear.say({"event": "alive", "spares": 1} if name == "parent" else {"event": "alive"})
    ear.run_until(lambda: ear.how)
    assert ear.how == "killed by SIGKILL"
    assert [event for event, _ in ear.heard] == ["alive"]
    (alarm,) = ear.alarms
    assert (alarm["event"], alarm["level"], alarm["process"]) == ("unintelligible", "alarm", name)
    assert alarm["pid"] == ear.child.pid
    assert alarm["reason"]


def test_a_descriptor_that_is_no_report_is_not_read(ears: Callable[[str], Ear]) -> None:
    """Reading a pipe would wait for whoever has its other end."""
    before = len(os.listdir("/proc/self/fd"))
    ear = ears("parent")
    read, write = os.pipe()
    unsealed = os.memfd_create("report")
    os.truncate(unsealed, 1024)
    good = make_report()
    ear.say(OVER, good)
    ear.run_until(lambda: ear.heard)
    ((name, event),) = ear.heard
    assert (name, event["end"]) == ("handshake_failed", "exited without a word")
    assert not ear.alarms
    ear.say(OVER, read)
    ear.run_until(lambda: ear.how)
    assert [alarm["event"] for alarm in ear.alarms] == ["unintelligible"]
    other = ears("parent")
    other.say(OVER, unsealed)
    other.run_until(lambda: other.how)
    assert [alarm["event"] for alarm in other.alarms] == ["unintelligible"]
    for descriptor in (read, write, unsealed, good):
        os.close(descriptor)
    for one in (ear, other):
        one.mouth.close()
    # Each has its loop's own descriptor left.
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_several_events_in_one_message_each_with_its_own_report(
    ears: Callable[[str], Ear],
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    ear = ears("parent")
    reports = []
    for octets in (100, 200):
        report = make_report()
        # state, end, octets from the client, octets to the client
        os.pwrite(report, struct.pack("=BBxxxxxxQQ", 4, 1, octets, 0), 0)
        reports.append(report)
    events = [OVER | {"connection": number} for number in (1, 2, 3)]
    del events[1]["uid"]
    ear.say([{"event": "alive", "spares": 1}, *events, {"event": "retired"}], *reports)
    ear.run_until(lambda: len(ear.heard) == 5)
    assert [name for name, _ in ear.heard] == ["alive", *["handshake_failed"] * 3, "retired"]
    passed = [event.get("octets_from_client") for _, event in ear.heard[1:4]]
    assert passed == [100, None, 200]
    assert not ear.alarms
    ear.say([events[0], {"event": "forged"}], reports[0])
    ear.run_until(lambda: ear.how)
    assert len(ear.heard) == 5
    assert [alarm["event"] for alarm in ear.alarms] == ["unintelligible"]
    for report in reports:
        os.close(report)
    ear.mouth.close()
    # The loop has its own descriptor left.
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def within(side: socket.socket) -> socket.socket:
    """A unix socket in whose queue this socket is: its one descriptor."""
    inner, outer = socket.socketpair()
    with outer:
        socket.send_fds(outer, [b"x"], [side.fileno()])
    return inner


@pytest.mark.parametrize(
    ("said", "count", "wrap"),
    [
        (OVER, 1, lambda side: side),
        (OVER, 1, within),
        # More than are received.
        ({"event": "alive", "spares": 1}, 200, lambda side: side),
    ],
    ids=["a socket", "within a socket", "too many"],
)
def test_it_cannot_have_the_supervisor_wait_in_closing_its_socket(
    ears: Callable[[str], Ear],
    said: object,
    count: int,
    wrap: Callable[[socket.socket], socket.socket],
) -> None:
    ear = ears("parent")
    side, peer = lingering()
    with peer:
        with side, wrap(side) as sent:
            ear.say({"event": "alive", "spares": 1})
            for _ in range(2):
                ear.say(said, *[sent.fileno()] * count)
        del side, sent
        began = time.monotonic()
        ear.run_until(lambda: ear.how)
        assert time.monotonic() - began < 60
    assert [event for event, _ in ear.heard] == ["alive"]
    assert [alarm["event"] for alarm in ear.alarms] == ["unintelligible"]


def test_whoever_closes_such_a_socket_waits() -> None:
    """The control."""
    side, peer = lingering()
    closes = f"import os; os.read(0, 1); os.close({side.fileno()})"
    with (
        peer,
        subprocess.Popen(
            [sys.executable, "-c", closes], stdin=subprocess.PIPE, pass_fds=[side.fileno()]
        ) as closing,
    ):
        side.close()
        assert closing.stdin is not None
        closing.stdin.write(b"x")
        closing.stdin.flush()
        deadline = time.monotonic() + 30
        # It is in close(2), asleep.
        while Path(f"/proc/{closing.pid}/syscall").read_text().split()[0] != "3":
            assert closing.poll() is None
            assert time.monotonic() < deadline
        assert closing.poll() is None
        closing.kill()


def test_what_another_process_says_for_one_that_has_ended_is_not_heard(
    ears: Callable[[str], Ear],
) -> None:
    """It would hold the supervisor for as long as it speaks."""
    ear = ears("keyd")
    ended = os.pidfd_open(ear.child.pid)
    said = 0

    def speak() -> None:
        nonlocal said
        if select.select([ended], [], [], 0)[0] and said < 1000:
            with suppress(BrokenPipeError):
                ear.say({"event": "alive"})
                said += 1

    ear.when_heard = speak
    ear.child.kill()
    select.select([ended], [], [], 30)
    ear.say({"event": "alive"})
    ear.run_until(lambda: ear.how)
    os.close(ended)
    assert ear.how == "killed by SIGKILL"
    # What it had sent before its end was noticed.
    assert 0 < len(ear.heard) < 100
