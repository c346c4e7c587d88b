"""Where the metrics are served, and what the process that serves them may want."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keyd.linux import seccomp
from titus_py.between.event_loop import EventLoop, Timer
from titus_py.configuration.address import IPAddress, UnixAddress
from titus_py.metrics.system_calls import SERVING_METRICS
from titus_py.supervisor import unprivileged
from titus_py.supervisor.metrics_address import MetricsAddress, listen_at

UID = 2_000_000_017
#: A process that is under an attacker's control: it says this, and answers nobody.
CONTROLLED = """
import socket, sys, time
supervisor = socket.socket(fileno=int(sys.argv[2].partition("=")[2]))
supervisor.send(b"R")
{}
supervisor.recv(1)
"""


class Served:
    def __init__(self, directory: Path) -> None:
        self.loop = EventLoop()
        self.made = 0
        self.events: list[tuple[str, dict[str, Any]]] = []
        told = {
            "uid": UID,
            "chroot": str(directory),
            "filter": seccomp.build(SERVING_METRICS).hex(),
        }
        self.address = MetricsAddress(self.loop, self._event, lambda: told, self._text)

    def _event(self, event: str, level: str = "info", **fields: Any) -> None:
        self.events.append((event, {"level": level, **fields}))

    def _text(self) -> bytes:
        self.made += 1
        return b"text %d\n" % self.made

    def run(self, until: Callable[[], object], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline
            self.loop.after(0.02, lambda: None)
            self.loop.run_once()

    def listen(self) -> int:
        self.address.adopt(None, socket.create_server(("127.0.0.1", 0)))
        assert self.address.listener is not None
        port: int = self.address.listener.getsockname()[1]
        return port

    def scrape(self, port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            client.setblocking(False)
            answer: list[bytes] = []

            def ended() -> bool:
                try:
                    answer.append(client.recv(4096))
                except BlockingIOError:
                    return False
                return not answer[-1]

            self.run(ended)
        return b"".join(answer)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    (empty := tmp_path / "empty").mkdir()
    found = Served(empty)
    yield found
    found.address.stop()
    if found.address.listener is not None:
        found.address.listener.close()


def control(monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    program = ("-c", CONTROLLED.format(does))
    monkeypatch.setattr(unprivileged, "_program", lambda _: program)


def test_a_text_serves_all_who_ask_within_a_moment(served: Served) -> None:
    port = served.listen()
    assert served.scrape(port).endswith(b"text 1\n")
    started = time.monotonic()
    answers = {served.scrape(port).rpartition(b"\n\n")[2] for _ in range(20)}
    assert served.made <= 2 + 4 * (time.monotonic() - started)
    assert len(answers) <= served.made
    assert served.events == []


def test_one_that_asks_without_end_gets_a_text_only_so_often(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    control(monkeypatch, 'while True: supervisor.send(b"W"); supervisor.recv(1)')
    served.listen()
    served.run(lambda: served.made)
    started, before = time.monotonic(), served.made
    served.run(lambda: served.made >= before + 4)
    assert time.monotonic() - started > 3 * 0.25
    assert served.events == []


@pytest.mark.parametrize("says", ['b"W" * 2', 'b"T"', 'b"R"', 'b"x" * 1000'])
def test_one_that_says_anything_else_is_replaced(
    served: Served, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    control(monkeypatch, f"supervisor.send({says})")
    served.listen()
    served.run(lambda: len(served.events) == 2)
    assert [event for event, _ in served.events] == ["unintelligible", "metrics_died"]
    assert served.events[0][1]["process"] == "metrics"


def test_one_that_wants_two_at_once_is_replaced(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    control(monkeypatch, 'while True: supervisor.send(b"W")')
    served.listen()
    served.run(lambda: len(served.events) == 2)
    assert [event for event, _ in served.events] == ["unintelligible", "metrics_died"]


def test_one_that_takes_no_text_gets_no_other(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be kept for it, in memory."""
    control(monkeypatch, 'while True: supervisor.send(b"W"); time.sleep(0.3)')
    served.listen()
    served.run(lambda: len(served.events) == 2)
    assert [event for event, _ in served.events] == ["unintelligible", "metrics_died"]
    assert served.made == 1


@pytest.mark.parametrize(
    ("longest", "expected"),
    [
        (30.0, [0.011, 0.022, 0.044]),
        # Each has run for longer than that.
        (0.012, [0.011, 0.011, 0.011]),
    ],
)
def test_the_next_one_comes_ever_later(
    served: Served, monkeypatch: pytest.MonkeyPatch, longest: float, expected: list[float]
) -> None:
    monkeypatch.setattr(unprivileged, "_PAUSE_SECONDS", (0.011, longest))
    real, pauses = served.loop.after, []

    def after(seconds: float, callback: Callable[[], None]) -> Timer:
        if seconds in (0.011, 0.022, 0.044):
            pauses.append(seconds)
        return real(seconds, callback)

    monkeypatch.setattr(served.loop, "after", after)
    served.address.process._pause = 0.011
    # Each has been of use before it died.
    control(monkeypatch, 'supervisor.send(b"W"); supervisor.recv(1); sys.exit(3)')
    served.listen()
    served.run(lambda: len(served.events) == 3)
    assert {fields["how"] for _, fields in served.events} == {"exited with 3"}
    assert pauses == expected


def test_without_a_descriptor_the_text_comes_later(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = os.memfd_create, []

    def memfd_create(name: str, flags: int) -> int:
        if name == "metrics" and not refused:
            refused.append(name)
            raise OSError(24, "Too many open files")
        return real(name, flags)

    monkeypatch.setattr(os, "memfd_create", memfd_create)
    assert served.scrape(served.listen()).endswith(b"text 2\n")
    assert refused
    assert served.events == []


def test_a_unix_socket(tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "metrics.sock"))
    listen_at(address).close()
    # The file that the first left behind is no obstacle.
    with listen_at(address):
        assert os.stat(address.path).st_mode & 0o777 == 0o660
        # One that is in use is.
        with pytest.raises(OSError, match="in use"):
            listen_at(address)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match="in use"):
        listen_at(UnixAddress(str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "precious"


def test_an_ipv6_socket() -> None:
    with listen_at(IPAddress("::1", 0)) as listener:
        assert listener.family == socket.AF_INET6
