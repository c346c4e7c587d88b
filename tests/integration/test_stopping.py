"""Stopping, and not starting."""

import ctypes
import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import prctl
import pytest

from .conftest import Certificates, Serve
from .instance import TITUS_PY, UIDS, eventually, free_port, toml
from .peers import Listener, TlsClient, connect, receive_exactly, was_reset

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])


@BOTH
def test_an_idle_instance_stops_at_once(
    serve: Serve, echoing: Listener, number: signal.Signals
) -> None:
    instance = serve(echoing.address)
    started = time.monotonic()
    instance.signal(number)
    assert instance.wait() == 0
    assert time.monotonic() - started < 20
    assert instance.wait_for_event("stopping")["reason"] == number.name
    assert instance.wait_for_event("stop")["code"] == 0
    instance.assert_nothing_is_left()


@BOTH
def test_who_insists_does_not_change_how_it_ends(
    serve: Serve, echoing: Listener, number: signal.Signals
) -> None:
    """Python, as it ends, would let a signal kill: there is time for many."""
    instance = serve(echoing.address)
    code = None
    while code is None:
        os.kill(instance.pid, number)
        with suppress(subprocess.TimeoutExpired):
            code = instance.wait(0.001)
    assert code == 0
    instance.assert_nothing_is_left()


@BOTH
def test_a_running_transfer_ends_before_the_instance_does(
    serve: Serve, backend: Listener, number: signal.Signals
) -> None:
    instance = serve(backend.address)
    octets = b"x" * (4 << 20)
    with TlsClient(instance.port) as client:
        client.handshake()
        with backend.accept() as accepted:
            instance.signal(number)
            instance.wait_for_event("stopping", drain=30.0)
            eventually(lambda: refuses(instance.port), "connections are refused")
            sender = threading.Thread(target=accepted.sendall, args=[octets])
            sender.start()
            assert client.receive_exactly(len(octets)) == octets
            client.send(b"and up")
            assert receive_exactly(accepted, 6) == b"and up"
            sender.join()
            accepted.shutdown(socket.SHUT_WR)
            client.close_notify()
            assert client.receive_all() == b""
            assert instance.wait() == 0
    assert instance.wait_for_event("connection_ended")["end"] == "clean"
    instance.assert_nothing_is_left()


def refuses(port: int) -> bool:
    try:
        connect(port).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        # It was in the queue that has just been closed.
        return False
    return False


def test_after_the_drain_time_what_is_left_is_reset(serve: Serve, backend: Listener) -> None:
    instance = serve(backend.address, worker={"drain": "1s"})
    with TlsClient(instance.port) as client:
        client.handshake()
        with backend.accept() as accepted:
            started = time.monotonic()
            instance.signal(signal.SIGTERM)
            with pytest.raises(ConnectionResetError):
                client.receive()
            assert 0.8 < time.monotonic() - started < 20
            assert was_reset(accepted)
            assert instance.wait() == 0
    assert instance.wait_for_event("connection_ended")["end"] == "drained"
    instance.assert_nothing_is_left()


@BOTH
def test_a_second_signal_ends_it_at_once(
    serve: Serve, backend: Listener, number: signal.Signals
) -> None:
    instance = serve(backend.address)
    with TlsClient(instance.port) as client:
        client.handshake()
        with backend.accept() as accepted:
            instance.signal(signal.SIGTERM)
            instance.wait_for_event("stopping")
            started = time.monotonic()
            instance.signal(number)
            assert instance.wait() == 0
            assert time.monotonic() - started < 20
            with pytest.raises(ConnectionResetError):
                client.receive()
            assert was_reset(accepted)
    assert instance.wait_for_event("connection_ended")["end"] == "closed at once"
    instance.assert_nothing_is_left()


def test_keyd_may_die_while_connections_are_drained(serve: Serve, backend: Listener) -> None:
    instance = serve(backend.address)
    instance.expected_alarms.add("keyd_died")
    with TlsClient(instance.port) as client:
        client.handshake()
        with backend.accept() as accepted:
            instance.signal(signal.SIGTERM)
            instance.wait_for_event("stopping")
            keyd = instance.keyd()
            keyd.kill()
            eventually(lambda: keyd not in instance.processes(), "keyd is gone")
            accepted.sendall(b"still here")
            assert client.receive_exactly(10) == b"still here"
            assert len(instance.events_named("keyd_started")) == 1
            client.close_notify()
            accepted.shutdown(socket.SHUT_WR)
            assert instance.wait() == 0


def test_a_parent_killed_while_draining_is_the_end(serve: Serve, backend: Listener) -> None:
    instance = serve(backend.address)
    instance.expected_alarms.add("parent_died")
    with TlsClient(instance.port) as client:
        client.handshake()
        with backend.accept():
            instance.signal(signal.SIGTERM)
            instance.wait_for_event("stopping")
            instance.parent().kill()
            instance.wait()
    instance.assert_nothing_is_left()


def test_an_instance_may_be_stopped_before_it_has_started(serve: Serve, echoing: Listener) -> None:
    """As early as its first word."""
    for _ in range(3):
        instance = serve(echoing.address, awaited="start")
        instance.signal(signal.SIGTERM)
        assert instance.wait() == 0
        instance.assert_nothing_is_left()


# --- not starting ----------------------------------------------------------------------


def test_an_address_in_use_is_named(
    certificates: Certificates, tmp_path: Path, backend: Listener
) -> None:
    free, taken = free_port(), backend.port
    configuration = write_configuration(certificates, tmp_path, free, taken)
    ended = subprocess.run(
        [TITUS_PY, "serve", "--config", configuration],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 1
    why = "Address already in use: 'ss -ltnp' shows by whom"
    message = f"titus-py: cannot listen on 127.0.0.1:{taken}: {why}"
    assert ended.stderr.splitlines()[-1] == message
    assert refuses(free)


def test_whoever_is_not_root_is_told_so(certificates: Certificates, tmp_path: Path) -> None:
    configuration = write_configuration(certificates, tmp_path, free_port())
    ended = subprocess.run(
        [TITUS_PY, "serve", "--config", configuration],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        preexec_fn=be_nobody_who_may_read_everything,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("titus-py: serve must be started as root")
    assert len(ended.stderr.splitlines()) == 1


def be_nobody_who_may_read_everything() -> None:
    """Wherever the package and the test's files are, they can be read (capabilities(7))."""
    prctl.set_keepcaps(True)
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    prctl.cap_effective.dac_read_search = True
    prctl.cap_inheritable.dac_read_search = True
    pr_cap_ambient, pr_cap_ambient_raise = 47, 2
    libc = ctypes.CDLL(None)
    assert not libc.prctl(pr_cap_ambient, pr_cap_ambient_raise, prctl.CAP_DAC_READ_SEARCH, 0, 0)


def write_configuration(certificates: Certificates, directory: Path, *ports: int) -> Path:
    certificate = certificates()
    uids = UIDS.take()
    configuration = directory / "titus.toml"
    configuration.write_text(
        toml(
            {
                "worker": {
                    "uids": f"{uids[0]}-{uids[-2]}",
                    "chroot": directory / "empty",
                },
                "keyd": {"user": str(uids[-1])},
                "listen": [{"address": f"127.0.0.1:{port}"} for port in ports],
                "vhost": [
                    {
                        "certificate": certificate.certificate,
                        "key": certificate.key,
                        "backend": "127.0.0.1:9",
                    }
                ],
            }
        )
    )
    return configuration
