"""Several backends of one virtual host: which gets a client, and what the failure of one costs."""

import ctypes
import json
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from OpenSSL import SSL

from .conftest import Serve
from .instance import TITUS_PY, Event, Instance, free_port
from .peers import Listener, TlsClient, Truncated, connect
from .test_backend_failures import full_backlog, is_reset_with_event

#: <asm-generic/socket.h>
_SO_ATTACH_FILTER = 26
#: A filter of one instruction, BPF_RET | BPF_K with 0, and the struct sock_fprog for it.
_INSTRUCTION = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0), 8)
_DROPPING_ALL = struct.pack("@HP", 1, ctypes.addressof(_INSTRUCTION))


def _queue(listener: socket.socket) -> int:
    """How many connections wait to be accepted (struct tcp_info, tcpi_unacked)."""
    (count,) = struct.unpack_from(
        "=I", listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 64), 24
    )
    return int(count)


class Named:
    """A backend that says its number to each client, and then waits for its end."""

    def __init__(self, number: int, port: int | None = None) -> None:
        self.number = number
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._listener: socket.socket | None = None
        self.start()

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=100)
        threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """Refuse everybody from now on. Those who were served go on."""
        if self._listener is not None:
            # Whom the kernel has let in is served, too: closing would reset those in the queue.
            self._listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _DROPPING_ALL)
            while _queue(self._listener):
                time.sleep(0.001)
            # close(2) alone would leave accept(2) waiting.
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None

    def _serve(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection = listener.accept()[0]
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        # A health check goes away at once.
        with suppress(OSError), connection:
            connection.sendall(b"%d" % self.number)
            while connection.recv(4096):
                continue


@pytest.fixture
def three() -> Iterator[list[Named]]:
    backends = [Named(number) for number in range(3)]
    yield backends
    for backend in backends:
        backend.stop()


def vhost(backends: list[Named], **settings: Any) -> list[dict[str, Any]]:
    return [{"backend": [backend.address for backend in backends], **settings}]


@contextmanager
def client(instance: Instance, source: str = "127.0.0.1") -> Iterator[tuple[TlsClient, int]]:
    """A client, and the number of the backend that it has got."""
    connection = connect(instance.port, source=source)
    with TlsClient(instance.port, source=connection) as connected:
        yield connected, int(connected.handshake().receive_exactly(1))


def served(instance: Instance, source: str = "127.0.0.1") -> int:
    with client(instance, source) as (_, number):
        return number


def ended(instance: Instance, connected: TlsClient) -> Event:
    host, port = connected.socket.getsockname()
    connected.close_notify()
    return instance.wait_for_event("connection_ended", client=f"{host}:{port}")


def test_in_turn_and_the_log_says_which(serve: Serve, three: list[Named]) -> None:
    instance = serve(vhost=vhost(three))
    assert Counter(served(instance) for _ in range(6)) == {0: 2, 1: 2, 2: 2}
    with client(instance) as (connected, number):
        assert ended(instance, connected)["backend"] == three[number].address


def test_by_connections(serve: Serve, three: list[Named]) -> None:
    instance = serve(vhost=vhost(three, balance="least-connections"))
    with ExitStack() as stack:
        held = [stack.enter_context(client(instance)) for _ in range(6)]
        assert Counter(number for _, number in held) == {0: 2, 1: 2, 2: 2}
        for connected, number in held:
            if number == 1:
                ended(instance, connected)
        assert [stack.enter_context(client(instance))[1] for _ in range(2)] == [1, 1]


def test_by_source(serve: Serve, three: list[Named]) -> None:
    instance = serve(vhost=vhost(three, balance="source"))
    # By addresses with random ports: one in a thousand times, twenty sources would leave one out.
    sources = [f"127.0.0.{number}" for number in range(20, 70)]
    first = {source: served(instance, source) for source in sources}
    assert set(first.values()) == {0, 1, 2}
    three[1].stop()
    second = {source: served(instance, source) for source in sources}
    assert {source for source in sources if first[source] != second[source]} == {
        source for source in sources if first[source] == 1
    }
    assert set(second.values()) == {0, 2}


def test_priority(serve: Serve, three: list[Named]) -> None:
    instance = serve(vhost=vhost(three, balance="priority"))
    assert {served(instance) for _ in range(3)} == {0}
    three[0].stop()
    assert {served(instance) for _ in range(3)} == {1}


def under_load(instance: Instance, act: Callable[[], None]) -> tuple[list[int], list[int]]:
    """What clients got who came before or while this was done, and who came when it was."""
    numbers: list[int] = []
    later: list[int] = []
    failures: list[object] = []
    done = threading.Event()
    over = threading.Event()

    def come(source: str) -> None:
        while not over.is_set():
            got = later if done.is_set() else numbers
            try:
                got.append(served(instance, source))
            except (OSError, AssertionError, ValueError, SSL.Error, Truncated) as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=come, args=(f"127.0.1.{n}",)) for n in range(1, 5)]
    for thread in threads:
        thread.start()

    def wait_for(got: list[int], enough: int) -> None:
        deadline = time.monotonic() + 120
        while len(got) < enough and not failures and time.monotonic() < deadline:
            time.sleep(0.01)

    wait_for(numbers, 10)
    act()
    done.set()
    # They have gone on coming while it was done.
    wait_for(later, 30)
    over.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert min(len(numbers), len(later) - 20) >= 10
    return numbers, later


def test_no_client_notices_that_one_of_three_has_gone(serve: Serve, three: list[Named]) -> None:
    instance = serve(vhost=vhost(three))
    numbers, later = under_load(instance, three[1].stop)
    assert 1 in numbers
    assert set(later) == {0, 2}
    assert not [event for event in instance.events() if event["event"] == "backend_unavailable"]


def test_if_all_have_gone_each_client_is_reset_and_told_of_in_the_log(
    serve: Serve, three: list[Named]
) -> None:
    instance = serve(vhost=vhost(three))
    for backend in three:
        backend.stop()
    for _ in range(2):
        reason, _ = is_reset_with_event(instance, "backend_unavailable")
        assert sorted(reason.split("; ")) == sorted(
            f"{one.address}: Connection refused" for one in three
        )
    three[2].start()
    assert served(instance) == 2


# --- health checks ------------------------------------------------------------------

#: Down and up within half a second.
HEALTH = {"every": "100ms", "timeout": "5s", "fall": 2, "rise": 2}


def told(instance: Instance, event: str, backend: Named) -> Event:
    return instance.wait_for_event(event, backend=backend.address)


def status(instance: Instance) -> dict[str, Any]:
    shown = subprocess.run(
        [TITUS_PY, "status", "--json", f"--pid={instance.pid}"], capture_output=True, check=True
    )
    found: dict[str, Any] = json.loads(shown.stdout)[0]
    return found


def test_a_backend_that_is_down_is_used_again_once_checks_succeed(
    serve: Serve, three: list[Named], tmp_path: Path
) -> None:
    """If all are down, each client is reset, with a reason of its own; no reload forgets."""
    instance = serve(
        vhost=vhost(three, health=HEALTH), metrics={"address": f"unix:{tmp_path}/metrics"}
    )
    for backend in three:
        backend.stop()
    for backend in three:
        down = told(instance, "backend_down", backend)
        assert (down["level"], down["reason"]) == (
            "error",
            f"{backend.address}: Connection refused",
        )
    reason, _ = is_reset_with_event(instance, "backend_unavailable")
    assert reason.startswith("every backend is down: ")
    assert all(f"{one.address}: Connection refused" in reason for one in three)
    assert [one["up"] for one in status(instance)["vhosts"][0]["health"]] == [False] * 3

    instance.signal(signal.SIGHUP)
    instance.wait_for_event("reloaded")
    subprocess.run([TITUS_PY, "reload", "--program", f"--pid={instance.pid}"], check=True)
    reason, _ = is_reset_with_event(instance, "backend_unavailable")
    assert reason.startswith("every backend is down: ")
    assert sum(event["event"] == "backend_down" for event in instance.events()) == 3

    three[1].start()
    told(instance, "backend_up", three[1])
    assert served(instance) == 1
    health = status(instance)["vhosts"][0]["health"]
    assert [one["up"] for one in health] == [False, True, False]
    assert health[0]["reason"] == f"{three[0].address}: Connection refused"
    with socket.socket(socket.AF_UNIX) as scraper:
        scraper.connect(f"{tmp_path}/metrics")
        scraper.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = b"".join(iter(lambda: scraper.recv(65536), b"")).decode()
    assert f'titus_backend_up{{backend="{three[0].address}"}} 0' in text
    assert f'titus_backend_up{{backend="{three[1].address}"}} 1' in text


def test_one_that_does_not_answer_has_its_share_of_the_time(
    serve: Serve, three: list[Named]
) -> None:
    """It is not known to be down yet: nothing but time tells."""
    with Listener.tcp(backlog=0) as silent:
        backends = [silent.address, three[1].address, three[2].address]
        instance = serve(
            vhost=[{"backend": backends, "balance": "priority"}],
            worker={"connect_timeout": "900ms"},
        )
        with full_backlog(silent):
            # Only the first client waits: the silent one then comes last for a while.
            assert [served(instance) for _ in range(3)] == [1, 1, 1]
    assert not [event for event in instance.events() if event["event"] == "backend_unavailable"]
