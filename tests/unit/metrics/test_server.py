"""The metrics address, against a real curl and against clients that mean no good."""

import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from titus_py.between.event_loop import EventLoop
from titus_py.metrics.server import MetricsServer

TEXT = b"# TYPE titus_x gauge\ntitus_x 1\n"


class Instance:
    """A server on a loop of its own thread, whose every round is timed."""

    def __init__(self, text: Callable[[], bytes] = lambda: TEXT) -> None:
        self.loop = EventLoop()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=32)
        self.port = self._listener.getsockname()[1]
        # As from the supervisor: it comes later.
        self.server = MetricsServer(
            self.loop,
            self._listener,
            lambda: self.loop.after(0, lambda: self.server.take(text())),
        )
        self.longest_round = 0.0
        self._stopped = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped:
            self.loop.after(0.02, lambda: None)
            started = time.thread_time()
            self.loop.run_once()
            self.longest_round = max(self.longest_round, time.thread_time() - started)

    def stop(self) -> None:
        self._stopped = True
        self._thread.join()
        self._listener.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def curl(self, *options: str) -> subprocess.CompletedProcess[bytes]:
        command = ["curl", "-sS", "--max-time", "60", *options]
        return subprocess.run(
            [*command, f"http://127.0.0.1:{self.port}/metrics"], capture_output=True, check=False
        )


@pytest.fixture
def instance() -> Iterator[Instance]:
    running = Instance()
    yield running
    running.stop()


@pytest.fixture
def big() -> Iterator[Instance]:
    running = Instance(lambda: b"x" * 50_000_000)
    yield running
    running.stop()


def read_all(client: socket.socket) -> bytes:
    octets = b""
    while more := client.recv(1 << 20):
        octets += more
    return octets


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_curl(instance: Instance) -> None:
    done = instance.curl("-i")
    assert done.returncode == 0, done.stderr
    head, body = done.stdout.split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"Content-Type: text/plain; version=0.0.4" in head
    assert body == TEXT
    until(lambda: instance.server.clients == 0)


@pytest.mark.parametrize(
    "options",
    [
        ["-X", "DELETE"],
        ["--data", "x" * 100_000],
        ["-H", "X: " + "y" * 30_000],
        ["--http2-prior-knowledge", "-o", "/dev/null"],
    ],
    ids=["delete", "post", "long head", "http2"],
)
def test_whatever_is_asked(instance: Instance, options: list[str]) -> None:
    instance.curl(*options)
    assert instance.curl().stdout == TEXT


def test_what_is_asked_does_not_matter(instance: Instance) -> None:
    for request in (b"\n\n", b"\0\xff nonsense\r\n\r\n", b"z" * 8192):
        with instance.connect() as client:
            client.sendall(request)
            assert read_all(client).endswith(TEXT)


def test_a_head_in_single_octets(instance: Instance) -> None:
    with instance.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for octet in b"GET / HTTP/1.1\r\nHost: x\r\n\r\n":
            client.send(bytes([octet]))
            time.sleep(0.001)
        assert read_all(client).endswith(TEXT)


def test_no_blank_line_no_answer(instance: Instance) -> None:
    with instance.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""


def test_more_than_a_request_does_not_cost_the_answer(instance: Instance) -> None:
    """Octets that are left unread would make the close a reset, and lose the answer."""
    with instance.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"x" * 60_000)
        time.sleep(0.2)
        assert read_all(client).endswith(TEXT)


def test_a_big_answer_is_whole(big: Instance) -> None:
    done = big.curl()
    assert len(done.stdout) == 50_000_000


def test_a_slow_reader_is_let_go_and_holds_nobody_up(big: Instance) -> None:
    with big.connect() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(b"GET / HTTP/1.1\r\n\r\n")
        started = time.monotonic()
        assert len(big.curl().stdout) == 50_000_000
        until(lambda: big.server.clients == 0)
        assert time.monotonic() - started > 3
    assert big.longest_round < 1


def test_a_silent_client_is_let_go(instance: Instance) -> None:
    with instance.connect() as silent:
        started = time.monotonic()
        assert read_all(silent) == b""
        assert time.monotonic() - started > 4
    until(lambda: instance.server.clients == 0)


def test_a_flood_of_silent_clients_does_not_shut_out_the_one_that_asks(instance: Instance) -> None:
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(instance.connect())
        until(lambda: instance.server.clients == 16)
        assert instance.curl().stdout == TEXT
        assert instance.server.clients <= 16


def test_clients_that_vanish(instance: Instance) -> None:
    for request in (b"", b"GET /", b"GET / HTTP/1.1\r\n\r\n", b"x" * 8192):
        for _ in range(20):
            client = instance.connect()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(request)
            client.close()
    assert instance.curl().stdout == TEXT
    until(lambda: instance.server.clients == 0)


def test_a_busy_flood_is_answered_from_one_text() -> None:
    made: list[int] = []

    def text() -> bytes:
        made.append(1)
        return TEXT

    running = Instance(text)
    started = time.monotonic()
    try:
        for _ in range(200):
            with running.connect() as client:
                client.sendall(b"\n\n")
                assert read_all(client).endswith(TEXT)
        assert len(made) <= 2 + 4 * (time.monotonic() - started)
    finally:
        running.stop()


def test_it_goes_on_after_it_had_no_descriptor_left(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = socket.socket.accept, []

    def accept(listener: socket.socket) -> tuple[socket.socket, object]:
        if not refused:
            refused.append(1)
            raise OSError(24, "Too many open files")
        return real(listener)

    monkeypatch.setattr(socket.socket, "accept", accept)
    assert instance.curl().stdout == TEXT
    assert refused
