"""Whatever ends or hangs: the service is back, nothing is left behind, all of it is on record."""

import fcntl
import json
import mmap
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from unittest import mock

import pytest
from conftest import Rounds
from OpenSSL import SSL

from .conftest import Certificates, Serve
from .instance import (
    PATIENCE,
    TITUS_PY,
    Instance,
    Process,
    all_processes,
    eventually,
    free_port,
    zombies,
)
from .peers import Listener, TlsClient, Truncated, connect
from .service import edit, launcher, reload, serves, talk, without_end
from .test_forged_events import mouth
from .test_pump import until_it_stands
from .test_stopping import write_configuration

FAILS = (SSL.Error, OSError, Truncated, AssertionError)
CLIENTS = 15


# --- killed, under load ----------------------------------------------------------------


class Load:
    """Clients that come, say something and go, and do not mind being turned away."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._over = threading.Event()
        self.served = 0
        self.failed = 0
        self._threads = [
            threading.Thread(target=self._come_and_go, args=[number]) for number in range(CLIENTS)
        ]

    def _come_and_go(self, number: int) -> None:
        chance = random.Random(number)
        while not self._over.is_set():
            try:
                with TlsClient(self._port) as client:
                    client.handshake()
                    for _ in range(3):
                        assert talk(client)
                        self._over.wait(chance.uniform(0, 0.3))
                self.served += 1
            except FAILS:
                self.failed += 1
                self._over.wait(0.1)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE)


def namespaces(pid: int) -> set[str]:
    found = set()
    # A process may end while it is being looked at.
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/ns"):
            with suppress(OSError):
                found.add(os.readlink(f"/proc/{pid}/ns/{name}"))
    return found


def seconds_until_served(port: int) -> float:
    started = time.monotonic()
    while True:
        with suppress(*FAILS):
            with TlsClient(port) as client:
                client.socket.settimeout(2)
                assert talk(client.handshake())
                return time.monotonic() - started
        assert time.monotonic() < started + PATIENCE
        time.sleep(0.02)


def and_whoever_is_with(processes: Iterable[Process]) -> set[Process]:
    """They, and all in namespaces that are theirs and not ours.

    Before they are killed: whatever starts later, of any test, may be in one that has the number of
    one that has gone. So the namespaces of those that end meanwhile do not count.
    """
    seen = {process: namespaces(process.pid) for process in all_processes()}
    there = set(processes) & seen.keys() & {*all_processes()}
    spaces = set().union(*(seen[process] for process in there)) - namespaces(os.getpid())
    return {*processes, *(process for process, its in seen.items() if its & spaces)}


def nothing_left_of(processes: set[Process]) -> None:
    """Nor as another one's child, once its own parent has ended."""
    numbers = {(process.pid, process.started) for process in processes}

    def left() -> list[Process]:
        return [one for one in all_processes() if (one.pid, one.started) in numbers]

    eventually(lambda: not left(), f"nothing left of {processes}")


def test_kills_under_load(
    certificates: Certificates, echoing: Listener, tmp_path: Path, rounds: Rounds
) -> None:
    """A worker, keyd, the parent and the supervisor (which systemd starts again), in turn.

    In the second round each meets what the first has left; others are as the second.
    """
    times = rounds(enough=2, full=5)
    port = free_port()
    configuration = write_configuration(certificates, tmp_path, port)
    text = configuration.read_text().replace("127.0.0.1:9", echoing.address)
    configuration.write_text(text + '[log]\nformat = "json"\n')
    uids = range(0)
    waits: dict[str, list[float]] = {"worker": [], "keyd": [], "parent": [], "supervisor": []}
    instances: list[Instance] = []

    def start() -> Instance:
        log = tmp_path / f"log-{len(instances)}"
        instance = Instance(["--config", str(configuration)], log, uids, port)
        instance.expected_alarms |= {"keyd_died", "parent_died", "connection_ended"}
        instance.expected_alarms.add("handshake_failed")
        instances.append(instance)
        return instance

    def kill(instance: Instance, which: str) -> None:
        since = len(instance.events())
        if which == "worker":
            eventually(lambda: kill_worker(instance), "a worker killed")
            waits[which].append(seconds_until_served(port))
            return
        victim = {
            "keyd": instance.keyd, "parent": instance.parent, "supervisor": instance.supervisor
        }[which]()  # fmt: skip
        everything = instance.processes()
        gone = {
            "keyd": [victim],
            "parent": [one for one in everything if one.pid != instance.pid],
            "supervisor": everything,
        }[which]
        going = and_whoever_is_with(gone)
        victim.kill()
        if which == "supervisor":
            instance.wait()
            start()
        waits[which].append(seconds_until_served(port))
        nothing_left_of(going)
        if which == "supervisor":
            assert not Path(f"/run/titus-py/{instance.pid}.control").exists()
            return
        died = instance.wait_for_event(f"{which}_died", since=since)
        assert (died["pid"], died["level"]) == (victim.pid, "alarm")
        assert died["how"] == "killed by SIGKILL"
        if which == "parent":
            earlier = {
                event["connection"]
                for event in instance.events()[:since]
                if event["event"] == "connection_begun"
            }
            assert not without_end(instance) & earlier

    try:
        start().wait_until_listening()
        with Load(port) as load:
            for _ in range(times):
                for which in ("worker", "keyd", "parent", "supervisor"):
                    time.sleep(0.3)
                    kill(instances[-1], which)
            served = load.served
            eventually(lambda: load.served > served + CLIENTS, "clients are served")
        last = instances[-1]
        eventually(lambda: not without_end(last), "an end of each connection")
        assert last.terminate() == 0
    finally:
        for instance in instances:
            instance.close()
    for name, seconds in waits.items():
        print(f"{name}: back after {', '.join(f'{one:.2f}' for one in seconds)} s")
    print(f"{load.served} clients served, {load.failed} turned away")
    assert max(max(seconds) for seconds in waits.values()) < 30
    killed = [
        event
        for instance in instances
        for event in instance.events()
        if event["level"] == "alarm" and event.get("end") == "killed by SIGKILL"
    ]
    assert len(killed) == times
    assert not Path(f"/run/titus-py/{last.pid}.control").exists()


def kill_worker(instance: Instance) -> bool:
    """Kill that of the newest connection. Returns whether it was there to be killed."""
    begun = eventually(lambda: without_end(instance), "a connection")
    event = instance.wait_for_event("connection_begun", connection=max(begun))
    try:
        instance.worker_of(event["uid"]).kill()
    except (StopIteration, ProcessLookupError):
        return False

    def ends() -> list[str]:
        events = instance.events()
        of_it = [one for one in events if one.get("connection") == event["connection"]]
        return [one["end"] for one in of_it if "end" in one]

    # It may have been about to end by itself.
    return "killed by SIGKILL" in eventually(ends, "its end")


def times_it_waited(process: Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"^voluntary_ctxt_switches:\s+(\d+)$", status, re.MULTILINE)
    assert found
    return int(found[1])


def test_all_that_a_killed_parent_said_is_on_record(serve: Serve, echoing: Listener) -> None:
    """The supervisor comes to hear it when the parent is gone already."""
    instance = serve(echoing.address)
    instance.expected_alarms |= {"parent_died"}
    supervisor, parent = instance.supervisor(), instance.parent()
    supervisor.kill(signal.SIGSTOP)
    ports = []
    with TlsClient(instance.port) as stays:
        talk(stays.handshake())
        for _ in range(90):
            with TlsClient(instance.port) as client:
                ports.append(client.socket.getsockname()[1])
                client.handshake()
        eventually(lambda: len(instance.workers()) <= 5, "the others' ends")
        eventually(lambda: not zombies(parent.pid), "taken note of")
        # It has said so, too, once it only waits.
        until_it_stands(lambda: times_it_waited(parent))
        parent.kill()
        eventually(lambda: parent not in all_processes(), "the parent's end")
        supervisor.kill(signal.SIGCONT)
        ports.append(stays.socket.getsockname()[1])
        instance.wait_for_event("parent_died", how="killed by SIGKILL")
    begun = {event["client"] for event in instance.events_named("connection_begun")}
    assert {f"127.0.0.1:{port}" for port in ports} <= begun
    assert not without_end(instance)
    (lost,) = instance.events_named("connection_ended", end="the parent ended")
    assert lost["client"] == f"127.0.0.1:{ports[-1]}"
    assert serves(instance)


# --- hung ------------------------------------------------------------------------------


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[None]:
    """A supervisor that takes a child to hang after 6 seconds instead of 15."""
    script = tmp_path / "driver.py"
    script.write_text(
        "import sys\n"
        "from titus_py.supervisor import children\n"
        "from titus_py.__main__ import main\n"
        "children._QUIET_SECONDS = 6.0\n"
        "sys.exit(main())\n"
    )
    driver = tmp_path / "titus-py"
    driver.write_text(f'#!/bin/sh\nexec {sys.executable} -I {script} "$@"\n')
    driver.chmod(0o755)
    with mock.patch("integration.instance.TITUS_PY", driver):
        yield


def test_who_hangs_is_ended_and_replaced(impatient: None, serve: Serve, echoing: Listener) -> None:
    with_keyd, with_parent = serve(echoing.address), serve(echoing.address)
    with TlsClient(with_keyd.port) as established:
        assert talk(established.handshake())
        stopped = {}
        for name, instance in (("keyd", with_keyd), ("parent", with_parent)):
            instance.expected_alarms |= {f"{name}_hangs", f"{name}_died"}
            stopped[name] = instance.keyd() if name == "keyd" else instance.parent()
            stopped[name].kill(signal.SIGSTOP)
        for name, instance in (("keyd", with_keyd), ("parent", with_parent)):
            assert instance.wait_for_event(f"{name}_hangs")["pid"] == stopped[name].pid
            died = instance.wait_for_event(f"{name}_died")
            assert (died["pid"], died["how"]) == (stopped[name].pid, "killed by SIGKILL")
            eventually(partial(serves, instance), f"another {name}")
        assert talk(established)
    assert len(with_keyd.events_named("parent_started")) == 1


@contextmanager
def says_that_it_is_alive(parent: Process, supervisor: Process) -> Iterator[None]:
    """As code in it would that takes no orders."""
    alive = json.dumps({"event": "alive", "spares": 1}).encode()
    over = threading.Event()

    def speak() -> None:
        while not over.wait(0.5):
            with suppress(OSError):
                ours.send(alive)

    with mouth(parent, supervisor) as ours:
        speaker = threading.Thread(target=speak)
        speaker.start()
        try:
            yield
        finally:
            over.set()
            speaker.join()


@pytest.mark.parametrize("speaks", [False, True])
def test_a_retired_parent_that_hangs_is_ended_too(
    impatient: None, serve: Serve, echoing: Listener, speaks: bool
) -> None:
    """A reload does not wait for it for ever, whatever else it says."""
    instance = serve(echoing.address)
    instance.expected_alarms |= {"parent_hangs", "parent_died"}
    parent = instance.parent()
    parent.kill(signal.SIGSTOP)
    said = says_that_it_is_alive(parent, instance.supervisor()) if speaks else nullcontext()
    with said:
        assert reload(instance)["reloaded"]
    assert instance.wait_for_event("parent_hangs")
    assert serves(instance)
    eventually(lambda: len([p for p in instance.processes() if p.parent == instance.pid]) == 2, "")


def test_a_supervisor_that_was_stopped_for_long_ends_nobody(
    impatient: None, serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address)
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        instance.signal(signal.SIGSTOP)
        time.sleep(8)
        assert talk(client)
        assert serves(instance)
        instance.signal(signal.SIGCONT)
        time.sleep(4)
        assert talk(client)
    assert not instance.events_named("parent_hangs")
    assert not instance.events_named("keyd_hangs")


# --- the service manager ---------------------------------------------------------------


class Manager:
    """What systemd is to a service: somebody to send messages to."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(PATIENCE)
        self.messages: list[tuple[float, dict[str, str]]] = []

    def fill(self, path: Path) -> None:
        """Until there is no room for any message."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    other.sendto(b"X_OTHER=1", str(path))

    def next(self) -> dict[str, str]:
        message = self.socket.recv(4096).decode()
        self.messages.append((time.monotonic(), dict(line.split("=") for line in lines(message))))
        return self.messages[-1][1]

    def until(self, **wanted: str) -> dict[str, str]:
        """The next message with these variables."""
        deadline = time.monotonic() + PATIENCE
        while not wanted.items() <= (message := self.next()).items():
            assert time.monotonic() < deadline, f"no {wanted}"
        return message

    def names(self, since: int = 0) -> list[str]:
        """What was said of the service's state, in order, from this message on."""
        known = ("READY", "RELOADING", "STOPPING")
        return [name for _, message in self.messages[since:] for name in known if name in message]


def lines(message: str) -> list[str]:
    return message.splitlines()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    with manager.socket:
        yield manager


def test_the_service_manager_is_told_why_it_was_not_started(
    manager: Manager, serve: Serve, echoing: Listener
) -> None:
    """What is found once there is a log, too."""
    with Listener.tcp() as other:
        instance = serve(
            echoing.address, awaited="start_failed", metrics={"address": other.address}
        )
        assert instance.wait() == 1
    why = f"metrics.address: {other.address}: Address already in use"
    manager.until(STATUS=f"not started: {why}")
    assert instance.wait_for_event("start_failed")["reason"] == why


def test_the_service_manager_is_told(manager: Manager, serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address)
    ready = manager.until(READY="1")
    assert "generation 1" in ready["STATUS"]

    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    instance.signal(signal.SIGHUP)
    reloading = manager.until(RELOADING="1")
    assert before <= int(reloading["MONOTONIC_USEC"]) <= time.clock_gettime_ns(1) // 1000
    assert manager.until(READY="1")

    since = len(manager.messages)
    edit(instance, lambda tables: tables["worker"].update(nonsense=1))
    assert not reload(instance)["reloaded"]
    manager.until(READY="1")
    assert manager.names(since) == ["RELOADING", "READY"]

    instance.signal(signal.SIGTERM)
    stopping = manager.until(STOPPING="1")
    assert int(stopping["EXTEND_TIMEOUT_USEC"]) >= 30_000_000
    assert instance.wait() == 0


def test_a_reload_is_ready_once_however_often_it_was_asked_for(
    manager: Manager, serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address)
    instance.expected_alarms.add("keyd_died")
    manager.until(READY="1")
    since, keyd = len(manager.messages), instance.keyd()
    instance.signal(signal.SIGHUP)
    # Not by the log, which may tell of it when it is over.
    manager.until(RELOADING="1")
    # Neither another keyd nor another wish is the end of it.
    keyd.kill()
    instance.signal(signal.SIGHUP)
    for _ in range(2):
        manager.until(READY="1")
    assert manager.names(since) == ["RELOADING", "READY", "RELOADING", "READY"]
    assert len(instance.wait_for_events(2, "reloaded")) == 2


def test_the_watchdog_is_fed_twice_as_often_as_it_asks_for(
    manager: Manager, serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address)
    manager.until(READY="1")
    fed: list[float] = []
    while len(fed) < 10:
        if "WATCHDOG" in manager.next():
            fed.append(manager.messages[-1][0])
    # On a busy machine one may come late, and the next one soon after it.
    assert 0.4 < median(later - at for at, later in pairwise(fed)) < 0.9
    # A supervisor that hangs does not feed it.
    instance.signal(signal.SIGSTOP)
    time.sleep(0.2)
    manager.socket.settimeout(0.1)
    with suppress(TimeoutError):
        while manager.next():
            continue
    manager.socket.settimeout(2)
    with pytest.raises(TimeoutError):
        manager.next()
    manager.socket.settimeout(PATIENCE)
    instance.signal(signal.SIGCONT)
    assert manager.until(WATCHDOG="1")


def test_a_service_manager_that_does_not_listen_holds_nobody_up(
    manager: Manager, serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address)
    time.sleep(8)
    assert serves(instance)
    assert reload(instance)["reloaded"]
    manager.socket.close()
    assert serves(instance)
    assert reload(instance)["reloaded"]


def test_a_service_manager_that_was_too_busy_is_told_later(
    manager: Manager, serve: Serve, echoing: Listener, tmp_path: Path
) -> None:
    """For want of one message it would take a start, or a reload, for one that goes on."""
    manager.fill(tmp_path / "notify")
    instance = serve(echoing.address)
    assert manager.until(READY="1")
    since = len(manager.messages)
    manager.fill(tmp_path / "notify")
    assert reload(instance)["reloaded"]
    assert manager.until(READY="1")
    assert manager.names(since) == ["RELOADING", "READY"]


def test_a_socket_that_was_passed_is_listened_on(
    serve: Serve, echoing: Listener, tmp_path: Path
) -> None:
    passed, other = free_port(), free_port()
    listen = [{"address": f"127.0.0.1:{port}"} for port in (passed, other)]
    with mock.patch("integration.instance.TITUS_PY", launcher(tmp_path, ("127.0.0.1", passed))):
        instance = serve(echoing.address, listen=listen)
    assert serves(instance, passed)
    assert serves(instance, other)
    with TlsClient(passed) as client:
        client.handshake()
        environments = {}
        for process in instance.processes():
            with suppress(FileNotFoundError, ProcessLookupError):  # a worker that has done its work
                environments[process.pid] = Path(f"/proc/{process.pid}/environ").read_bytes()
        staying = {instance.keyd().pid, instance.parent().pid, instance.fork_server().pid}
        assert staying < environments.keys() - {instance.pid}
        for pid in environments.keys() - {instance.pid}:
            assert b"LISTEN_" not in environments[pid]

    # It stays the service manager's: taken out of the configuration, and put back in.
    edit(instance, lambda tables: tables["listen"].pop(0))
    assert reload(instance)["reloaded"]
    assert serves(instance, other)
    with TlsClient(passed) as waiting:
        waiting.socket.sendall(waiting.first_flight())
        edit(instance, lambda tables: tables["listen"].insert(0, listen[0]))
        assert reload(instance)["reloaded"]
        assert talk(waiting.handshake())


# --- nobody to talk to -----------------------------------------------------------------


@contextmanager
def started_by_shell(configuration: Path, port: int, redirected: str) -> Iterator[int]:
    command = f"exec {TITUS_PY} serve --config {shlex.quote(str(configuration))} {redirected}"
    process = subprocess.Popen(["sh", "-c", command], start_new_session=True)

    def listens() -> bool:
        assert process.poll() is None, process.returncode
        try:
            connect(port).close()
        except ConnectionRefusedError:
            return False
        return True

    try:
        eventually(listens, "it listens")
        yield process.pid
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "redirected",
    ["2>&-", "2>/dev/full", ">&- 2>&- <&-", "2>{}/unread"],
    ids=["closed", "full", "all closed", "unread"],
)
def test_it_serves_without_anybody_to_take_its_log(
    certificates: Certificates, echoing: Listener, tmp_path: Path, redirected: str
) -> None:
    port = free_port()
    configuration = write_configuration(certificates, tmp_path, port)
    text = configuration.read_text().replace("127.0.0.1:9", echoing.address)
    configuration.write_text(text + '[log]\nformat = "json"\n')
    os.mkfifo(tmp_path / "unread")
    reader = os.open(tmp_path / "unread", os.O_RDWR)
    holds = fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, mmap.PAGESIZE)
    with started_by_shell(configuration, port, redirected.format(tmp_path)) as pid:
        # More than a pipe holds: each has two events.
        for _ in range(holds // 100):
            with TlsClient(port) as client:
                assert talk(client.handshake())
        for descriptor in ("0", "1", "2"):
            # What it opens must not be what it, or a library, writes its words to.
            with suppress(FileNotFoundError):
                target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
                assert not target.startswith(("socket:", "anon_inode:")), descriptor
        os.kill(pid, signal.SIGHUP)
        time.sleep(2)
        with TlsClient(port) as client:
            assert talk(client.handshake())
    os.close(reader)
