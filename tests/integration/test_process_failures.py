"""keyd, the parent or the supervisor killed, stuck, or short of processes."""

import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from OpenSSL import SSL

from titus_py.supervisor.control import control_path

from .conftest import Serve
from .instance import Instance, Process, all_processes, eventually
from .peers import TIMEOUT, Listener, TlsClient, Truncated, connect, receive_exactly, unaccepted
from .service import reload, status

FAILS = (SSL.Error, Truncated, ConnectionResetError, BrokenPipeError)


def talk(client: TlsClient) -> bool:
    client.send(b"ping")
    return client.receive_exactly(4) == b"ping"


def serves(instance: Instance) -> bool:
    with TlsClient(instance.port) as client:
        return talk(client.handshake())


def await_end_of(process: Process) -> None:
    eventually(lambda: process not in all_processes(), f"the end of {process}")


def kill_and_await(instance: Instance, process: Process, name: str) -> None:
    """Kill it, and wait until the next one of its kind has started."""
    since = len(instance.events())
    process.kill()
    died = instance.wait_for_event(f"{name}_died", since=since)
    assert (died["pid"], died["how"]) == (process.pid, "killed by SIGKILL")
    instance.wait_for_event(f"{name}_started", since=since)


# --- keyd ------------------------------------------------------------------------------


def test_a_killed_keyd_is_replaced_and_established_connections_go_on(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address)
    instance.expected_alarms.add("keyd_died")
    before = instance.settled_counts()
    with TlsClient(instance.port) as client:
        talk(client.handshake())
        kill_and_await(instance, instance.keyd(), "keyd")
        assert talk(client)
        assert serves(instance)
        assert talk(client)
    assert instance.settled_counts() == before
    assert len(instance.events_named("parent_started")) == 1


@pytest.mark.parametrize("which", ["keyd", "parent", "fork server"])
def test_a_signal_without_a_name_ends_nobody_else(
    serve: Serve, echoing: Listener, which: str
) -> None:
    """SIGRTMIN and its like."""
    instance = serve(echoing.address)
    instance.expected_alarms |= {"keyd_died", "parent_died", "fork_server_died"}
    which_one = {
        "keyd": instance.keyd, "parent": instance.parent, "fork server": instance.fork_server
    }  # fmt: skip
    os.kill(which_one[which]().pid, 40)
    died = instance.wait_for_event(f"{which.replace(' ', '_')}_died")
    assert died["how"] == "killed by signal 40"
    eventually(lambda: serves_by_now(instance), "served again")


def serves_by_now(instance: Instance) -> bool:
    try:
        return serves(instance)
    except (*FAILS, ConnectionRefusedError):
        return False


def test_a_supervisor_without_a_descriptor_to_spare_goes_on(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address)
    _, hard = resource.prlimit(instance.pid, resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir(f"/proc/{instance.pid}/fd"))
    resource.prlimit(instance.pid, resource.RLIMIT_NOFILE, (highest + 1, hard))
    # Those numbers that are free below it are taken by clients that ask nothing.
    with ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(asking(instance.pid))
        instance.signal(signal.SIGHUP)
        instance.wait_for_event("reload_failed")
        assert serves(instance)
        resource.prlimit(instance.pid, resource.RLIMIT_NOFILE, (hard, hard))
    assert status(instance)["pid"] == instance.pid
    assert reload(instance)["reloaded"]


def asking(pid: int) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(str(control_path(pid)))
    return client


def test_a_client_that_comes_while_keyd_is_gone_is_served_by_the_next(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address)
    instance.expected_alarms.add("keyd_died")
    instance.keyd().kill()
    # The first of them may have been let in to the keyd that was about to go.
    assert all(serves(instance) for _ in range(3))


def test_a_stopped_keyd_fails_handshakes_within_their_timeout(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address, worker={"handshake_timeout": "2s"})
    # What it had been asked for, it finds when it wakes up: too late then.
    instance.expected_alarms.add("keyd_refused")
    before = instance.settled_counts()
    keyd = instance.keyd()
    keyd.kill(signal.SIGSTOP)
    try:
        for version in (SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION):
            started = time.monotonic()
            with TlsClient(instance.port, versions=(version, version)) as client:
                with pytest.raises(FAILS):
                    client.handshake()
                assert 1.5 < time.monotonic() - started < 40
                host, port = client.socket.getsockname()
            event = instance.wait_for_event("handshake_failed", client=f"{host}:{port}")
            assert event["end"] in ("handshake_failed", "handshake_timeout")
    finally:
        keyd.kill(signal.SIGCONT)
    assert serves(instance)
    assert instance.settled_counts() == before


def with_a_long_memory(directory: Path) -> Path:
    """Failures within a minute count, instead of within ten seconds."""
    script, program = directory / "driver.py", directory / "titus-py"
    script.write_text(
        "import sys\n"
        "from titus_py.supervisor import starting\n"
        "from titus_py.__main__ import main\n"
        "starting._FAILURES_SECONDS = 60.0\n"
        "sys.exit(main())\n"
    )
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I {script} "$@"\n')
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("which", ["keyd", "parent"])
def test_three_failures_in_a_row_are_the_end(
    serve: Serve, echoing: Listener, tmp_path: Path, which: str
) -> None:
    """On a busy machine each new start takes seconds."""
    instance = serve(echoing.address, program=with_a_long_memory(tmp_path))
    instance.expected_alarms |= {"keyd_died", "parent_died", "giving_up"}
    instance.expected_alarms.add("connection_ended")
    with TlsClient(instance.port) as client:
        client.handshake()
        for count in range(1, 4):
            assert not instance.events_named("giving_up")
            process = instance.keyd() if which == "keyd" else instance.parent()
            process.kill()
            instance.wait_for_event(f"{which}_died", pid=process.pid)
            if count < 3:
                instance.wait_for_events(count + 1, f"{which}_started")
                assert serves(instance)
    assert instance.wait() == 1
    assert len(instance.events_named("giving_up", level="alarm")) == 1
    last_word = instance.events()[-1]
    assert (last_word["event"], last_word["code"]) == ("stop", 1)
    assert instance.events_named(f"{which}_died")[2]
    instance.assert_nothing_is_left()


# --- the parent ------------------------------------------------------------------------


def test_a_killed_parent_is_replaced_and_takes_its_workers_along(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address)
    instance.expected_alarms.add("parent_died")
    before = instance.settled_counts()
    with TlsClient(instance.port) as client:
        client.handshake()
        workers = instance.confined_workers(4)
        kill_and_await(instance, instance.parent(), "parent")
        with pytest.raises(ConnectionResetError):
            client.receive()
        assert serves(instance)
    eventually(lambda: not {*workers} & {*instance.processes()}, "no worker of the old parent")
    assert instance.settled_counts() == before


def test_a_killed_parent_counts_as_one_failure(serve: Serve, echoing: Listener) -> None:
    """Its keyd goes with it, as it should: that is no failure of keyd's."""
    instance = serve(echoing.address)
    instance.expected_alarms.add("parent_died")
    for _ in range(2):
        supervisor, parent, keyd = instance.supervisor(), instance.parent(), instance.keyd()
        # It is to learn of both ends at the same time.
        supervisor.kill(signal.SIGSTOP)
        since = len(instance.events())
        parent.kill()
        await_end_of(keyd)
        supervisor.kill(signal.SIGCONT)
        instance.wait_for_event("parent_started", since=since)
        assert serves(instance)
    assert not instance.events_named("keyd_died")


def test_connections_wait_in_the_listen_queue_while_there_is_no_parent(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address)
    instance.expected_alarms.add("parent_died")
    parent = instance.parent()
    parent.kill(signal.SIGSTOP)
    with TlsClient(instance.port) as client:
        parent.kill()
        assert talk(client.handshake())


# --- the supervisor --------------------------------------------------------------------


def test_nothing_survives_a_killed_supervisor(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address)
    with TlsClient(instance.port) as client:
        client.handshake()
        assert len(instance.processes()) >= 4
        instance.signal(signal.SIGKILL)
        instance.wait()
        instance.assert_nothing_is_left()
        with pytest.raises(ConnectionResetError):
            client.receive()
    with pytest.raises(ConnectionRefusedError):
        connect(instance.port)


# --- no more processes -----------------------------------------------------------------


def test_more_clients_than_max_wait_and_are_served_later(serve: Serve, echoing: Listener) -> None:
    worker, limits = {"max": 2, "spare": 2}, {"handshakes": 2}
    instance = serve(echoing.address, worker=worker, limits=limits)
    first, second, third, fourth = (TlsClient(instance.port) for _ in range(4))
    try:
        assert talk(first.handshake())
        assert talk(second.handshake())
        for waiting in (third, fourth):
            waiting.socket.sendall(waiting.first_flight())
        instance.wait_for_event("full", max=2)
        third.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):
            third.handshake()
        third.socket.settimeout(TIMEOUT)
        assert talk(first)
        assert talk(second)
        assert len(instance.events_named("full")) == 1
        first.socket.close()
        assert talk(third.handshake())
        second.socket.close()
        assert talk(fourth.handshake())
    finally:
        for client in (first, second, third, fourth):
            client.socket.close()
    instance.wait_for_events(4, "connection_ended")
    assert serves(instance)


@contextmanager
def a_limit_on_processes(process: Process, limit: int) -> Iterator[Callable[[], object]]:
    """A control group of its own for one process and its children to come (pids.max).

    What it yields lifts the limit.
    """
    group = pids_hierarchy() / f"titus-py-test-{process.pid}"
    home = group.parent
    group.mkdir()
    try:
        (group / "pids.max").write_text(str(limit))
        (group / "cgroup.procs").write_text(str(process.pid))
        yield lambda: (group / "pids.max").write_text("max")
        (group / "pids.max").write_text("max")
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            try:
                (home / "cgroup.procs").write_text(pid)
            except ProcessLookupError:
                continue
        eventually(lambda: remove(group), "an empty control group")


def remove(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        for pid in (group / "cgroup.procs").read_text().split():
            try:
                (group.parent / "cgroup.procs").write_text(pid)
            except OSError:
                continue
        return False
    return True


def pids_hierarchy() -> Path:
    """Where control groups that limit processes can be made; skips where nowhere."""
    first, second = Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")
    home = first if first.is_dir() else second
    if home is second:
        controllers = second / "cgroup.subtree_control"
        try:
            if "pids" not in controllers.read_text().split():
                controllers.write_text("+pids")
        except OSError as error:
            pytest.skip(f"no control groups that limit processes: {error}")
    if not os.access(home, os.W_OK):
        pytest.skip(f"{home} cannot be written to")
    return home


def test_those_that_there_are_go_on_when_no_more_can_be_forked(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address, worker={"spare": 2})
    before = instance.settled_counts(spare=2)
    busy = (instance.parent(), instance.fork_server())
    with a_limit_on_processes(instance.fork_server(), 1):
        with TlsClient(instance.port) as first, TlsClient(instance.port) as second:
            # Those that wait already are not in the group.
            assert talk(first.handshake())
            assert talk(second.handshake())
            event = instance.wait_for_event("fork_failed")
            assert event["reason"].endswith("Resource temporarily unavailable")
            third = TlsClient(instance.port)
            third.socket.sendall(third.first_flight())
            ticks = sum(map(processor_ticks, busy))
            time.sleep(1)
            assert sum(map(processor_ticks, busy)) - ticks < 20, "they try again and again"
            assert talk(first)
            assert len(instance.events_named("fork_failed")) == 1
    with third:
        instance.wait_for_event("fork_works_again")
        assert talk(third.handshake())
    assert serves(instance)
    assert instance.settled_counts(spare=2) == before


@contextmanager
def waiting_for_a_worker(instance: Instance) -> Iterator[TlsClient]:
    """A client whom nobody can be forked for; the two spare workers have others."""
    with TlsClient(instance.port) as first, TlsClient(instance.port) as second:
        assert talk(first.handshake())
        assert talk(second.handshake())
        instance.wait_for_event("fork_failed")
        with TlsClient(instance.port) as third:
            third.socket.sendall(third.first_flight())
            eventually(lambda: not unaccepted(instance.port), "it is accepted")
            yield third


def test_who_waits_for_a_worker_gets_one_after_a_reload(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address, worker={"spare": 2, "handshake_timeout": "60s"})
    before = instance.settled_counts(spare=2)
    starved = instance.fork_server()
    with a_limit_on_processes(starved, 1) as lift, waiting_for_a_worker(instance) as client:
        assert reload(instance)["reloaded"]
        assert serves(instance)
        client.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.handshake()
        lift()
        client.socket.settimeout(TIMEOUT)
        assert talk(client.handshake())
    eventually(lambda: len(status(instance)["generations"]) == 1, "one generation")
    assert instance.settled_counts(spare=2) == before


def test_who_waits_for_a_worker_is_reset_at_the_end(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address, worker={"spare": 2, "drain": "1s"})
    instance.settled_counts(spare=2)
    with a_limit_on_processes(instance.fork_server(), 1), waiting_for_a_worker(instance) as client:
        assert instance.terminate() == 0
        with pytest.raises(ConnectionResetError):
            client.handshake()


def test_who_waits_for_a_worker_does_so_for_the_handshake_timeout(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address, worker={"spare": 2, "handshake_timeout": "3s"})
    instance.settled_counts(spare=2)
    with a_limit_on_processes(instance.fork_server(), 1), waiting_for_a_worker(instance) as client:
        started = time.monotonic()
        with pytest.raises(ConnectionResetError):
            client.handshake()
        assert time.monotonic() - started < 30
        event = instance.wait_for_event("limited", limit="handshake_timeout")
        assert (event["count"], event["last_client"]) == (1, "127.0.0.1")
    instance.wait_for_event("fork_works_again")
    assert serves(instance)


def processor_ticks(process: Process) -> int:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_worker_that_is_killed_as_a_spare_is_replaced(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address)
    instance.expected_alarms.add("worker_failed")
    before = instance.settled_counts()
    victim = instance.confined_workers(4)[0]
    victim.kill()
    instance.wait_for_event("worker_failed", uid=victim.uid)
    assert instance.settled_counts() == before
    assert serves(instance)


def test_many_spares_killed_at_once_cost_nobody_a_connection(
    serve: Serve, echoing: Listener
) -> None:
    """As the kernel does where memory runs out. They had confined themselves."""
    instance = serve(echoing.address, worker={"spare": 16})
    instance.expected_alarms.add("worker_failed")
    before = instance.settled_counts(spare=16)
    with TlsClient(instance.port) as established:
        assert talk(established.handshake())
        parent = instance.parent()
        busy = instance.wait_for_event("connection_begun", client=established.name)["uid"]
        spares = [worker for worker in instance.workers() if worker.uid != busy]
        # The parent finds all of them dead in one round.
        parent.kill(signal.SIGSTOP)
        for spare in spares:
            spare.kill()
        parent.kill(signal.SIGCONT)
        instance.wait_for_events(len(spares), "worker_failed")
        assert serves(instance)
        assert talk(established)
        assert instance.parent() == parent
    assert instance.settled_counts(spare=16) == before


def test_every_connection_has_a_uid_of_its_own(serve: Serve, backend: Listener) -> None:
    instance = serve(backend.address)
    clients: list[TlsClient] = []
    backends: list[socket.socket] = []
    for _ in range(10):
        clients.append(TlsClient(instance.port).handshake())
        backends.append(backend.accept())
    workers = instance.confined_workers(11)
    uids = {worker.uid for worker in workers}
    assert len(uids) == len(workers)
    assert uids <= set(instance.uids[:-1])
    assert instance.keyd().uid == instance.uids[-1]
    for client, accepted in zip(clients, backends, strict=True):
        client.send(b"x")
        assert receive_exactly(accepted, 1) == b"x"
        client.socket.close()
        accepted.close()
