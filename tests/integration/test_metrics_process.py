"""The process that serves the metrics: only where there are any; replaced, never waited for."""

import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from titus_py.audit.finding import Verdict
from titus_py.audit.instance import Process, Role, instance_processes
from titus_py.audit.run import audit
from titus_py.audit.target import find_target

from .conftest import Serve
from .installed import Installed
from .instance import TITUS_PY, Instance, eventually, free_port
from .peers import Listener, TlsClient
from .service import status, talk

SECONDS = 60.0


def serving(instance: Instance) -> list[Process]:
    return [one for one in instance_processes(instance.pid) if one.role is Role.METRICS]


def connect(address: tuple[str, int] | str) -> socket.socket:
    if isinstance(address, str):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(SECONDS)
        client.connect(address)
        return client
    return socket.create_connection(address, timeout=SECONDS)


def scrape(address: tuple[str, int] | str) -> str:
    """The answer; raises OSError if the connection is refused or reset."""
    with connect(address) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while octets := client.recv(65536):
            answer += octets
    head, _, text = answer.decode().partition("\r\n\r\n")
    assert not head or head.startswith("HTTP/1.0 200 OK")
    return text


def is_served(instance: Instance) -> None:
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def instance(serve: Serve, echoing: Listener, port: int) -> Instance:
    return serve(echoing.address, metrics={"address": f"127.0.0.1:{port}"})


def test_without_an_address_there_is_none(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address)
    assert serving(instance) == []
    assert status(instance)["processes"] == []


def test_it_has_a_uid_of_its_own_and_is_replaced(instance: Instance, port: int) -> None:
    [first] = eventually(lambda: serving(instance), "a process for the metrics")
    assert "titus_build_info" in scrape(("127.0.0.1", port))
    [first] = serving(instance)
    [told] = status(instance)["processes"]
    assert (told["process"], told["state"], told["pid"]) == ("metrics", "ready", first.pid)
    assert first.uid in instance.uids
    assert [one.pid for one in instance.processes() if one.uid == first.uid] == [first.pid]
    instance.expected_alarms = {"metrics_died"}
    with connect(("127.0.0.1", port)) as half_open:
        half_open.sendall(b"GET /met")
        subprocess.run(["kill", "-KILL", str(first.pid)], check=True)
        died = instance.wait_for_event("metrics_died", pid=first.pid)
        assert died["how"] == "killed by SIGKILL"
        [told] = status(instance)["processes"]
        assert told["pid"] != first.pid
        # A scraper that comes meanwhile waits for the next one.
        text = scrape(("127.0.0.1", port))
    assert 'titus_child_deaths_total{child="metrics"} 1' in text
    assert 'titus_alarms_total{event="metrics_died"} 1' in text
    assert [one.pid for one in serving(instance)] != [first.pid]
    is_served(instance)


def test_one_that_fails_is_not_taken_for_an_attacker(
    serve: Serve, echoing: Listener, port: int, tmp_path: Path
) -> None:
    """Its filter kills one that makes another call, as Python does on its way to a traceback."""
    program = Installed(tmp_path / "program")
    program.has("titus_py/metrics/server.py", "elif not self._wanted:", "elif not self._unknown:")
    metrics = {"address": f"127.0.0.1:{port}"}
    instance = serve(echoing.address, program=program.titus_py, metrics=metrics)
    instance.expected_alarms = {"metrics_died"}
    # In one way or another.
    with suppress(OSError):
        assert scrape(("127.0.0.1", port)) == ""
    assert instance.wait_for_event("metrics_died")["how"] == "exited with 1"


def test_half_open_scrapes_hinder_nobody(instance: Instance, port: int) -> None:
    scrape(("127.0.0.1", port))
    before = instance.supervisor().descriptors
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connect(("127.0.0.1", port))).sendall(b"GET / HTTP/1.1\r\n")
        is_served(instance)
        assert status(instance)["generations"]
        # None of them is the supervisor's. (It may have one or two of its own more or less.)
        assert instance.supervisor().descriptors < before + 8
        assert "titus_build_info" in scrape(("127.0.0.1", port))


def test_one_that_hangs_holds_up_nothing_else(instance: Instance, port: int) -> None:
    [process] = eventually(lambda: serving(instance), "a process for the metrics")
    scrape(("127.0.0.1", port))
    instance.expected_alarms = {"metrics_died"}
    subprocess.run(["kill", "-STOP", str(process.pid)], check=True)
    with connect(("127.0.0.1", port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        is_served(instance)
        instance.signal(signal.SIGHUP)
        instance.wait_for_event("reloaded")
        is_served(instance)
        subprocess.run(["kill", "-KILL", str(process.pid)], check=True)
        instance.wait_for_event("metrics_died")


def configure(instance: Instance, old: str, new: str) -> None:
    file = instance.directory / "titus.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    instance.signal(signal.SIGHUP)


def refused(address: tuple[str, int] | str) -> Callable[[], bool]:
    def attempt() -> bool:
        try:
            connect(address).close()
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        return False

    return attempt


def test_another_address_by_reload(instance: Instance, port: int, tmp_path: Path) -> None:
    assert "titus_build_info" in scrape(("127.0.0.1", port))
    instance.signal(signal.SIGHUP)
    instance.wait_for_event("reloaded", generation=2)
    assert "titus_generation 2" in scrape(("127.0.0.1", port))
    path = f"{tmp_path}/metrics.sock"
    configure(instance, f'"127.0.0.1:{port}"', f'"unix:{path}"')
    instance.wait_for_event("reloaded", generation=3)
    assert "titus_generation 3" in scrape(path)
    assert Path(path).stat().st_mode & 0o777 == 0o660
    assert Path(path).stat().st_uid == 0
    assert refused(("127.0.0.1", port))()
    # And back, without waiting.
    configure(instance, f'"unix:{path}"', f'"127.0.0.1:{port}"')
    instance.wait_for_event("reloaded", generation=4)
    assert "titus_generation 4" in scrape(("127.0.0.1", port))
    assert refused(path)()
    configure(instance, f'[metrics]\naddress = "127.0.0.1:{port}"', "")
    instance.wait_for_event("reloaded", generation=5)
    assert refused(("127.0.0.1", port))()
    eventually(lambda: not serving(instance), "no process for the metrics")


def test_another_program_starts_its_own(instance: Instance, port: int) -> None:
    scrape(("127.0.0.1", port))
    [first] = serving(instance)
    subprocess.run([TITUS_PY, "reload", "--program", f"--pid={instance.pid}"], check=True)
    assert "titus_generation 2" in scrape(("127.0.0.1", port))
    # The first one may take a moment to end.
    eventually(lambda: [one.pid == first.pid for one in serving(instance)] == [False], "another")
    is_served(instance)


@pytest.mark.parametrize("unix", [False, True])
def test_an_audit_finds_it_as_it_should_be(
    serve: Serve, echoing: Listener, tmp_path: Path, port: int, unix: bool
) -> None:
    path = f"{tmp_path}/metrics.sock"
    address = path if unix else ("127.0.0.1", port)
    written = f"unix:{path}" if unix else f"127.0.0.1:{port}"
    instance = serve(echoing.address, metrics={"address": written})
    with connect(address) as client:
        client.sendall(b"GET")
        scrape(address)
        made = audit(find_target(instance.pid))
    assert made.having(Verdict.BROKEN) == []
    found = {one.check: one.seen for one in made.findings if one.subject.role == Role.METRICS}
    expected = {"uid", "groups", "capabilities", "no_new_privs", "hidden", "filter", "limits"}
    assert found.keys() >= expected | {"descriptors", "mappings", "environment"}
    assert "listening socket" in found["descriptors"]
    assert "who asks for the metrics" in found["descriptors"]
