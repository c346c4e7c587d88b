"""The fork server killed, stuck, not confined, or making workers that are not."""

import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest import mock

import pytest

from keyd.linux.descriptors import send_descriptors
from titus_py.between.messages import Fork

from .conftest import Serve
from .instance import Instance, Process, eventually, zombies
from .peers import Listener, TlsClient
from .service import reload, serves, status, talk
from .test_forged_events import mouth
from .test_supervision import CLIENTS, Load

Change = Callable[[str], None]


@pytest.fixture
def change(tmp_path: Path) -> Iterator[Change]:
    """Have the fork server be changed by these lines of Python before it begins."""
    with ExitStack() as stack:

        def change(lines: str) -> None:
            changed, parent, driver = (tmp_path / f"{name}.py" for name in ("fork", "parent", "it"))
            changed.write_text(
                "import sys\n"
                "from titus_py.fork_server import confinement\n"
                "from titus_py.fork_server import life as fork_server\n"
                + textwrap.dedent(lines)
                + "sys.exit(fork_server.main())\n"
            )
            parent.write_text(
                "import sys\n"
                "from titus_py.parent import forks\n"
                "from titus_py.parent import life as parent\n"
                f"forks._PROGRAM = ({str(changed)!r},)\n"
                "sys.exit(parent.main())\n"
            )
            driver.write_text(
                "import sys\n"
                "from titus_py.supervisor import child\n"
                "from titus_py.__main__ import main\n"
                f"child._PARENT = ({str(parent)!r},)\n"
                "sys.exit(main())\n"
            )
            program = tmp_path / "titus-py"
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -I {driver} "$@"\n')
            program.chmod(0o755)
            stack.enter_context(mock.patch("integration.instance.TITUS_PY", program))

        yield change


# --- what workers inherit --------------------------------------------------------------


def memory(process: Process, of_which: str) -> int:
    """Octets (proc_pid_smaps(5))."""
    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    (kib,) = (line.split()[1] for line in rollup.splitlines() if line.startswith(f"{of_which}:"))
    return int(kib) * 1024


def copied_code(process: Process) -> int:
    """How many octets of it are mapped. A huge page of it is there once it has been run."""
    maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    ends = [line.split()[0].split("-") for line in maps if "/memfd:code" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in ends)


def test_nearly_all_is_on_huge_pages(serve: Serve, echoing: Listener) -> None:
    """Each other page costs every fork, and the end of every worker."""
    server = serve(echoing.address).fork_server()
    assert memory(server, "AnonHugePages") > 0.8 * memory(server, "Anonymous")


def test_it_stays_on_huge_pages(serve: Serve, echoing: Listener) -> None:
    """A fork server that wrote to them would split them, and its forks would cost more again."""
    instance = serve(echoing.address)
    before = memory(instance.fork_server(), "AnonHugePages")
    assert before > 0
    (generation,) = status(instance)["generations"]
    assert generation["huge_pages"] * (2 << 20) == before
    assert generation["huge_pages_of_code"] * (2 << 20) == copied_code(instance.fork_server()) > 0
    for _ in range(20):
        assert serves(instance)
    assert memory(instance.fork_server(), "AnonHugePages") == before


# --- killed ----------------------------------------------------------------------------


def test_a_killed_fork_server_is_replaced_by_a_new_generation(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address)
    instance.expected_alarms.add("fork_server_died")
    before = instance.settled_counts()
    with Load(instance.port) as load, TlsClient(instance.port) as established:
        assert talk(established.handshake())
        eventually(lambda: load.served > CLIENTS, "load")
        parents = [instance.parent()]
        for generation in (2, 3):
            since = len(instance.events())
            instance.fork_server().kill()
            killed = time.monotonic()
            died = instance.wait_for_event("fork_server_died", since=since)
            assert died["level"] == "alarm"
            assert died["how"].startswith("killed by")
            instance.wait_for_event("parent_started", since=since, generation=generation)
            assert serves(instance)
            print(f"back after {time.monotonic() - killed:.2f} s")
            assert time.monotonic() - killed < 30
            parents.append(instance.parent())
            assert talk(established)
            served = load.served
            eventually(lambda served=served: load.served > served + CLIENTS, "load")
        assert talk(established)
        # Its parent stays for it, and for nothing else.
        assert parents[0] in instance.processes()
    eventually(lambda: not {*parents[:-1]} & {*instance.processes()}, "the others' ends")
    # Those who waited for a worker were turned away, each client once a time at most.
    assert load.failed <= 2 * CLIENTS
    assert instance.settled_counts() == before
    assert instance.terminate() == 0


def test_fork_servers_that_end_again_and_again_are_the_end(serve: Serve, echoing: Listener) -> None:
    """And a clean one: for the service manager to start it anew."""
    instance = serve(echoing.address)
    instance.expected_alarms |= {"fork_server_died", "giving_up"}
    for number in range(3):
        instance.fork_server().kill()
        instance.wait_for_events(number + 1, "fork_server_died")
        if number < 2:
            instance.wait_for_events(number + 1, "reloaded")
    assert instance.wait() == 1
    instance.wait_for_event("giving_up")
    assert instance.events_named("stop")[-1]["code"] == 1
    instance.assert_nothing_is_left()


def test_nobody_is_taken_whom_nobody_can_serve(serve: Serve, echoing: Listener) -> None:
    """keyd is back at once, and the old parent would like to go on; but it has no fork server."""
    instance = serve(echoing.address)
    instance.expected_alarms |= {"fork_server_died", "keyd_died"}
    instance.fork_server().kill()
    instance.keyd().kill()
    instance.wait_for_event("keyd_died")
    instance.wait_for_event("fork_server_died")
    for _ in range(12):
        assert serves(instance)


@pytest.mark.parametrize("outcome", ["reloaded", "reload_failed"])
def test_one_that_is_killed_during_a_reload_is_replaced(
    change: Change, serve: Serve, echoing: Listener, tmp_path: Path, outcome: str
) -> None:
    """By what the reload brings, or else by another of the same; connections go on."""
    slow, killed_meanwhile = tmp_path / "slow", tmp_path / "killed"
    change(f"""
        import time
        from pathlib import Path

        slow = Path({str(slow)!r})
        if slow.exists():
            slow.unlink()
            while not Path({str(killed_meanwhile)!r}).exists():
                time.sleep(0.01)
            if {outcome == "reload_failed"}:
                sys.exit("no luck")
        """)
    instance = serve(echoing.address)
    instance.expected_alarms |= {"fork_server_died", "parent_died", "?"}
    slow.touch()
    with TlsClient(instance.port) as established:
        assert talk(established.handshake())
        killed = instance.fork_server()
        instance.signal(signal.SIGHUP)
        eventually(lambda: not slow.exists(), "a fork server in the making")
        killed.kill()
        instance.wait_for_event("fork_server_died")
        assert not instance.events_named(outcome)
        killed_meanwhile.touch()
        instance.wait_for_event(outcome)
        instance.wait_for_event("reloaded", generation=2)
        assert all(serves(instance) for _ in range(12))
        assert talk(established)


def test_a_fork_server_that_hangs_is_ended_and_replaced(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address)
    instance.expected_alarms |= {"fork_server_died", "fork_server_hangs"}
    with TlsClient(instance.port) as established:
        assert talk(established.handshake())
        instance.fork_server().kill(signal.SIGSTOP)
        # More than the spares that there are: the last of them wait, and are turned away.
        for _ in range(8):
            with suppress(ConnectionResetError), TlsClient(instance.port) as client:
                client.socket.settimeout(60)
                client.handshake()
        assert instance.wait_for_event("fork_server_died")["how"] == "killed by SIGKILL"
        eventually(lambda: serves(instance), "served by another generation")
        assert talk(established)


def test_nothing_is_left_of_a_killed_parents(serve: Serve, echoing: Listener) -> None:
    """Neither of its fork server nor of its workers, whose uids somebody else is to have."""
    instance = serve(echoing.address)
    instance.expected_alarms.add("parent_died")
    since = len(instance.events())
    instance.parent().kill()
    instance.wait_for_event("parent_started", since=since)
    eventually(lambda: not zombies(instance.pid), "no zombies")


def test_a_retired_parent_ends_although_a_spare_hangs(serve: Serve, echoing: Listener) -> None:
    """It is stopped, and so does not leave when it is told to."""
    instance = serve(echoing.address, worker={"spare": 1})
    instance.expected_alarms.add("worker_failed")
    (spare,) = instance.confined_workers()
    eventually(lambda: spare.sleeps, "a spare")
    spare.kill(signal.SIGSTOP)
    parent = instance.parent()
    assert reload(instance)["reloaded"]
    alarm = instance.wait_for_event("worker_failed", uid=spare.uid)
    assert (alarm["how"], alarm["why"]) == ("killed by SIGKILL", "hung before it had a client")
    eventually(lambda: parent not in instance.processes(), "its end")
    assert serves(instance)


def test_nothing_is_left_of_a_retired_parents(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address)
    for generation in (2, 3):
        assert reload(instance)["reloaded"]
        instance.wait_for_event("parent_started", generation=generation)
    eventually(lambda: not zombies(instance.pid), "no zombies")


# --- ordered what no parent orders --------------------------------------------------------

#: The uids of workers are above 0.
FORGED = {
    "root": Fork(0).encode(),
    "two in one": Fork(1).encode() * 2,
}
REASONS = {
    "root": "the parent ordered a worker with a uid that is not for workers",
    "two in one": "the parent sent what is no order",
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_fork_server_ends_rather_than_forks_what_is_not_for_it(
    serve: Serve, echoing: Listener, forged: str
) -> None:
    """By whoever has taken the parent over, which is not root as the fork server is."""
    instance = serve(echoing.address)
    instance.expected_alarms.add("fork_server_died")
    with TlsClient(instance.port) as established:
        assert talk(established.handshake())
        parent, fork_server = instance.parent(), instance.fork_server()
        instance.confined_workers(4)
        with mouth(parent, fork_server) as ours, open(os.devnull) as nothing:
            send_descriptors(ours, FORGED[forged], [nothing.fileno()] * 2)
        # It says why to its parent: it may not write to files, and the log here is one.
        how = instance.wait_for_event("fork_server_died")["how"]
        assert how == f"exited with 1: {REASONS[forged]}"
        of_it = [one for one in instance.processes() if one.parent == parent.pid]
        assert all(one.uid for one in of_it)
        eventually(lambda: serves(instance), "served by another generation")
        assert talk(established)


def test_one_that_does_not_start_says_why(
    serve: Serve, echoing: Listener, change: Change, tmp_path: Path
) -> None:
    """Once it is confined, and may not write to a log that is a file."""
    unlucky = tmp_path / "unlucky"
    change(f"""
        import os
        if os.path.exists({str(unlucky)!r}):
            def give_back():
                raise OSError("no luck")
            fork_server.give_back = give_back
        """)
    instance = serve(echoing.address)
    instance.expected_alarms |= {"parent_died", "?"}
    unlucky.touch()
    assert not reload(instance)["reloaded"]
    assert "titus-py: the fork server did not start: no luck\n" in instance.log()
    assert serves(instance)


# --- short of descriptors --------------------------------------------------------------


def test_the_parent_goes_on_when_it_cannot_take_a_worker(serve: Serve, echoing: Listener) -> None:
    """It has the descriptors that it takes to order some, and not those that they come with."""
    instance = serve(echoing.address)
    instance.expected_alarms.add("worker_failed")
    before = instance.settled_counts()
    parent = instance.parent()
    with TlsClient(instance.port) as established:
        assert talk(established.handshake())
        uid = instance.wait_for_event("connection_begun")["uid"]
        highest = max(int(name) for name in os.listdir(f"/proc/{parent.pid}/fd"))
        parent.kill(signal.SIGSTOP)
        for worker in instance.workers():
            if worker.uid != uid:
                worker.kill()
        parent.limit_descriptors(highest - 1)
        parent.kill(signal.SIGCONT)
        time.sleep(1)
        assert talk(established)
        parent.limit_descriptors()
        assert serves(instance)
        assert talk(established)
    assert not instance.events_named("parent_died")
    eventually(lambda: not zombies(parent.pid), "no zombies")
    assert instance.settled_counts() == before


# --- not confined ----------------------------------------------------------------------


def ended(instance: Instance) -> str:
    """All that was said by an instance that came to nothing."""
    assert instance.wait() not in (0, None)
    instance.assert_nothing_is_left()
    return instance.log()


#: What is changed of everybody else in practice, and what is then said.
PRACTICE = {
    "leaves": ("def connect(*_): pass", "a connection for practice ended with None"),
    "fails": ("def connect(*_): raise OSError('no luck')", "OSError: no luck"),
    "hangs": (
        "rehearsal._PATIENCE_SECONDS = 1\ndef connect(*_): import signal; signal.pause()",
        "practice, which takes milliseconds, stood still for 1 s",
    ),
}


@pytest.mark.parametrize("changed", PRACTICE)
def test_a_fork_server_whose_practice_fails_is_the_end(
    change: Change, serve: Serve, echoing: Listener, changed: str
) -> None:
    lines, said = PRACTICE[changed]
    change(
        f"from titus_py.fork_server import rehearsal\n{lines}\nrehearsal._connect_once = connect\n"
    )
    instance = serve(echoing.address, awaited="start")
    instance.expected_alarms |= {"parent_died", "giving_up", "?"}
    assert said in ended(instance)


def test_a_fork_server_that_cannot_be_confined_is_the_end(
    change: Change, serve: Serve, echoing: Listener
) -> None:
    """Whoever has put something into the empty directory since it was looked at."""
    change("""
        from pathlib import Path

        confine = fork_server.confine_fork_server

        def fails(chroot: str, parent: int) -> None:
            something = Path(chroot, "something")
            something.touch()
            try:
                confine(chroot, parent)
            finally:
                something.unlink()

        fork_server.confine_fork_server = fails
        """)
    instance = serve(echoing.address, awaited="start")
    instance.expected_alarms |= {"parent_died", "giving_up", "?"}
    log = ended(instance)
    assert f"PermissionError: {instance.directory}/empty is not empty" in log
    assert "titus-py: the fork server did not start: see above" in log
    assert not instance.events_named("listening")


#: What is changed, and what of a worker's calls then fails.
CHANGES = {
    "without CAP_SETUID": (
        "from keyd.linux import prctl; confinement.FORK_SERVER_CAPABILITIES.pop(prctl.CAP_SETUID)",
        "setresuid: Operation not permitted",
    ),
    "without CAP_SETGID": (
        "from keyd.linux import prctl; confinement.FORK_SERVER_CAPABILITIES.pop(prctl.CAP_SETGID)",
        "setgroups: Operation not permitted",
    ),
    "no such filter": (
        "fork_server.Program.address = property(lambda self: 8, lambda self, address: None)",
        "seccomp: Bad address",
    ),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_worker_that_is_not_confined_never_serves(
    change: Change, serve: Serve, echoing: Listener, changed: str
) -> None:
    lines, failed = CHANGES[changed]
    change(lines + "\n")
    instance = serve(echoing.address, awaited="start")
    instance.expected_alarms |= {"worker_failed", "parent_died", "giving_up", "?"}
    log = ended(instance)
    alarms = instance.events_named("worker_failed")
    assert alarms
    for alarm in alarms:
        assert alarm["level"] == "alarm"
        assert alarm["how"] == "exited with 70"
        assert f"not confined: {failed}" in alarm["why"]
    assert "titus-py: workers cannot confine themselves" in log
    assert not instance.events_named("connection_begun")


def test_without_the_privilege_for_namespaces_nobody_is_forked(
    change: Change, serve: Serve, echoing: Listener
) -> None:
    change("""
        from keyd.linux import prctl
        confinement.FORK_SERVER_CAPABILITIES.pop(prctl.CAP_SYS_ADMIN)
        """)
    instance = serve(echoing.address)
    event = instance.wait_for_event("fork_failed")
    assert event["reason"] == "Operation not permitted"
    assert not instance.workers()


# --- out of memory ------------------------------------------------------------------------


def test_when_memory_runs_out_workers_are_ended_before_those_that_others_need(
    serve: Serve, echoing: Listener
) -> None:
    """As the kernel's own score of them has it."""
    instance = serve(echoing.address)

    def score(process: Process) -> int:
        return int(Path(f"/proc/{process.pid}/oom_score").read_text())

    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        workers = [*instance.confined_workers(4), instance.fork_server()]
        others = [instance.supervisor(), instance.parent(), instance.keyd()]
        assert min(map(score, workers)) > max(map(score, others))
