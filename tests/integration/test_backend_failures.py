"""Backends that refuse, do not answer or die."""

import itertools
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import prctl
import pytest

from titus_py.audit.finding import Verdict
from titus_py.audit.run import audit
from titus_py.audit.target import find_target

from .conftest import Serve
from .instance import Instance, free_port
from .peers import TIMEOUT, Listener, TlsClient, reset
from .test_pump import until_it_stands


def is_reset_with_event(instance: Instance, end: str) -> tuple[str, float]:
    """Connect, expect a reset; returns the backend's failure, and how long it took."""
    earlier, started = len(instance.events()), time.monotonic()
    with TlsClient(instance.port) as client:
        client.handshake()
        with pytest.raises(ConnectionResetError):
            client.receive()
        taken = time.monotonic() - started
        host, port = client.socket.getsockname()
    ended = instance.wait_for_event("connection_ended", since=earlier, client=f"{host}:{port}")
    assert ended["end"] == end
    failure = instance.wait_for_event("backend_unavailable", connection=ended["connection"])
    assert failure["level"] == "error"
    assert ended["detail"] == failure["reason"]
    return failure["reason"], taken


def is_served(instance: Instance, listener: Listener) -> None:
    with TlsClient(instance.port) as client:
        client.handshake()
        with listener.accept() as backend:
            backend.sendall(b"here I am")
            assert client.receive_exactly(9) == b"here I am"


@contextmanager
def full_backlog(listener: Listener) -> Iterator[None]:
    """Nobody more can connect to it for now."""
    address = listener.socket.getsockname()
    waiting = []
    # The last of them is neither refused nor taken.
    for _ in range(4):
        waiting.append(socket.socket(listener.socket.family, socket.SOCK_STREAM))
        waiting[-1].setblocking(False)
        waiting[-1].connect_ex(address)
    try:
        yield
    finally:
        for client in waiting:
            client.close()
        listener.socket.setblocking(False)
        try:
            while True:
                listener.socket.accept()[0].close()
        except BlockingIOError:
            pass
        listener.socket.settimeout(TIMEOUT)


def test_a_backend_that_refuses_is_tried_afresh_with_the_next_connection(serve: Serve) -> None:
    port = free_port()
    instance = serve(f"127.0.0.1:{port}")
    reason, _ = is_reset_with_event(instance, "backend_unavailable")
    assert reason == f"127.0.0.1:{port}: Connection refused"
    with Listener(socket.create_server(("127.0.0.1", port)), "") as listener:
        is_served(instance, listener)
    is_reset_with_event(instance, "backend_unavailable")


def test_a_unix_socket_that_is_not_there_yet_is_tried_afresh(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "app.sock"
    instance = serve(f"unix:{path}")
    reason, _ = is_reset_with_event(instance, "backend_unavailable")
    assert reason == f"unix:{path}: No such file or directory"
    with Listener.unix(path) as listener:
        is_served(instance, listener)
    reason, _ = is_reset_with_event(instance, "backend_unavailable")
    assert reason == f"unix:{path}: Connection refused"


def test_a_unix_socket_is_reached_by_its_group_without_a_capability(serve: Serve) -> None:
    gid = 2_000_000_013
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        path = Path(directory, "app.sock")
        with Listener.unix(path) as listener:
            path.chmod(0o660)
            os.chown(path, 0, gid)
            instance = serve(listener.address, worker={"backend_groups": [str(gid)]})
            is_served(instance, listener)
            status = Path(f"/proc/{instance.parent().pid}/status").read_text()
            (capabilities,) = re.findall(r"CapPrm:\t(.*)", status)
            assert int(capabilities, 16) == 1 << prctl.CAP_KILL
            assert re.findall(r"Groups:\t(.*)", status) == [f"{gid} "]
            made = audit(find_target(instance.pid))
            assert made.having(Verdict.BROKEN) == []
            # The control: the socket of another group.
            os.chown(path, 0, gid + 1)
            reason, _ = is_reset_with_event(instance, "backend_unavailable")
            assert reason == f"unix:{path}: Permission denied"
            instance.signal(signal.SIGHUP)
            warned = instance.wait_for_event("configuration", level="warning")
            assert f"{path} keeps titus-py from this socket" in warned["problem"]


@pytest.mark.parametrize("kind", ["TCP", "unix"])
def test_a_backend_that_does_not_answer_is_given_up_after_the_connect_timeout(
    serve: Serve, tmp_path: Path, kind: str
) -> None:
    with (
        Listener.tcp(backlog=0) if kind == "TCP" else Listener.unix(tmp_path / "app.sock", 0)
    ) as listener:
        instance = serve(listener.address, worker={"connect_timeout": "700ms"})
        with full_backlog(listener):
            reason, taken = is_reset_with_event(instance, "backend_unavailable")
        assert reason == "no answer in 0.7 s"
        assert 0.5 < taken < 30
        is_served(instance, listener)


def test_a_client_that_leaves_meanwhile_is_forgotten(serve: Serve) -> None:
    with Listener.tcp(backlog=0) as listener:
        instance = serve(listener.address, worker={"connect_timeout": "700ms"})
        before = instance.settled_counts()
        with full_backlog(listener):
            TlsClient(instance.port).handshake().reset()
            instance.wait_for_event("backend_unavailable")
            instance.wait_for_event("connection_ended")
        assert instance.settled_counts() == before


def test_the_next_address_of_a_name_is_tried_where_one_refuses(serve: Serve) -> None:
    """The name is localhost, which may be ::1 first; only 127.0.0.1 listens."""
    with Listener.tcp() as listener:
        instance = serve(f"localhost:{listener.port}")
        is_served(instance, listener)


def test_a_backend_that_dies_in_mid_transfer_resets_its_client_alone(
    serve: Serve, backend: Listener
) -> None:
    instance = serve(backend.address)
    with TlsClient(instance.port) as dying, TlsClient(instance.port) as other:
        dying.handshake()
        died = backend.accept()
        other.handshake()
        with backend.accept() as alive:
            died.sendall(b"x" * 100_000)
            reset(died)
            with pytest.raises(ConnectionResetError):
                dying.receive_all()
            instance.wait_for_event("connection_ended", end="backend_reset")
            alive.sendall(b"still")
            assert other.receive_exactly(5) == b"still"
    is_served(instance, backend)


def test_a_name_that_cannot_be_resolved_is_an_error_in_the_log_and_no_more(
    serve: Serve,
) -> None:
    instance = serve("nobody.invalid:80")
    event = instance.wait_for_event("backend_unresolved")
    assert (event["backend"], event["level"]) == ("nobody.invalid:80", "error")
    reason, _ = is_reset_with_event(instance, "backend_unavailable")
    assert reason == "no address"


def test_a_backend_that_cannot_be_handed_over_ends_the_connection(
    serve: Serve, backend: Listener
) -> None:
    """The parent has a descriptor for the backend, and none to hand it over."""
    instance = serve(backend.address)
    instance.expected_alarms.add("fork_failed")
    parent = instance.parent()
    instance.confined_workers(4)
    # Its first ClientHello is answered with a HelloRetryRequest.
    with TlsClient(instance.port, groups=["X25519", "X25519MLKEM768"]) as client:
        client.socket.sendall(client.first_flight())
        instance.wait_for_event("connection_begun")

        def descriptors() -> set[int]:
            return {int(number) for number in os.listdir(f"/proc/{parent.pid}/fd")}

        until_it_stands(descriptors)  # what was handed over is closed
        used = descriptors()
        free = next(number for number in itertools.count() if number not in used)
        parent.limit_descriptors(free + 1)
        try:
            client.handshake()
            ended = instance.wait_for_event("connection_ended")
        finally:
            parent.limit_descriptors()
    assert ended["end"] == "does not take its backend: Too many open files"
