"""Another program in the supervisor's place, without anybody noticing who is being served."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from titus_py.supervisor.control import control_path
from titus_py.supervisor.control_client import ask

from .conftest import Certificates, Serve
from .instance import PATIENCE, TITUS_PY, Instance, Uids, eventually, free_port
from .peers import TlsClient
from .service import (
    clients_meanwhile,
    edit,
    install,
    name_shown_to_a_new_client,
    reload,
    replace,
    serves,
    status,
    talk,
    without_end,
)
from .test_reload import generation_processes, no_earlier_generation

#: What is installed: a program that a test may replace by another one.
_PROGRAM = f"""\
#!{sys.executable} -I
import sys
{{}}
from titus_py.__main__ import main

sys.exit(main())
"""


class Program:
    """A program of a test's own, to be replaced by other revisions of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.install("")

    def install(self, statements: str) -> None:
        """The next revision, which does this before all else."""
        new = self.path.with_suffix(".new")
        new.write_text(_PROGRAM.format(statements))
        new.chmod(0o755)
        new.replace(self.path)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path / "titus-py")


def reload_program(instance: Instance) -> dict[str, Any]:
    return ask(instance.pid, {"do": "reload program"}, PATIENCE)


def why_not(instance: Instance) -> list[str]:
    answer = reload_program(instance)
    assert answer["reloaded"] is False
    problems: list[str] = answer["problems"]
    return problems


def test_a_new_program_takes_over_and_nobody_is_refused(
    serve: Serve, certificates: Certificates, patient: str, program: Program, tmp_path: Path
) -> None:
    metrics = free_port()
    site = install(certificates("P-256", "before.test"), tmp_path)
    instance = serve(
        patient,
        program=program.path,
        uids_count=6000,
        vhost=[{"certificate": site.certificate, "key": site.key}],
        metrics={"address": f"127.0.0.1:{metrics}"},
    )
    before = instance.settled_counts()
    with TlsClient(instance.port) as stayer:
        assert talk(stayer.handshake())
        with clients_meanwhile(instance, 3):
            install(certificates("P-256", "after.test"), tmp_path)
            for number in (2, 3, 4):
                marker = tmp_path / f"revision-{number}"
                program.install(f"open({str(marker)!r}, 'w').close()")
                assert reload_program(instance) == {"reloaded": True, "generation": number}
                assert marker.exists(), "the new one runs"
                assert name_shown_to_a_new_client(instance) == "after.test"
                assert talk(stayer)
        told = status(instance)
        assert told["pid"] == instance.pid
        assert [one["state"] for one in told["generations"]][-1] == "serving"
        assert told["generations"][0]["connections"] == 1, "the one that stays"
        text = urllib.request.urlopen(f"http://127.0.0.1:{metrics}/", timeout=PATIENCE).read()
        assert told["counts"]["reloads"] == {"ok": 3, "failed": 0}
        assert talk(stayer)
    no_earlier_generation(instance)
    eventually(lambda: not without_end(instance), "an end of each connection")
    ends = [event["end"] for event in instance.events() if "end" in event]
    assert set(ends) <= {"client_truncated", "client_left"}, "as the clients ended them"

    def logged_as_counted() -> bool:
        counted = status(instance)["counts"]
        # All of the log, also those that have used spare workers up: they may end at any time.
        logged = [json.loads(line) for line in instance.log().splitlines()]
        begun = [event for event in logged if event["event"] == "connection_begun"]
        ended = [event for event in logged if "end" in event]
        return (sum(counted["ended"].values()), counted["accepted"]) == (len(ended), len(begun))

    eventually(logged_as_counted, "the log has what is counted")
    assert b"titus_connections_accepted_total" in text
    instance.wait_for_events(3, "program_changed")
    assert len(instance.events_named("program_changed", pid=instance.pid)) == 3
    assert instance.settled_counts() == before


_WITHOUT_CHECKS = """
from titus_py.configuration import helper
helper.KEYD_CHECK = sys.executable, "-c", "raise SystemExit(3)"
helper.HANDSHAKE_CHECK = sys.executable, "-c", "raise SystemExit(4)"
"""


def test_the_command_waits_for_the_new_program(
    serve: Serve, patient: str, program: Program
) -> None:
    instance = serve(patient, program=program.path)
    command = [TITUS_PY, "reload", "--program", "--pid", str(instance.pid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "titus-py: reloaded: generation 2 serves\n"
    program.install("sys.exit('it is broken')")
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert done.stderr == "titus-py: not reloaded: the new program failed: it is broken\n"
    # One that starts, and can look at no key, has all its reasons told.
    program.install(_WITHOUT_CHECKS)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert "could not be checked by 'keyd check': exit code 3: no message\n" in done.stderr
    assert "whether a handshake is possible: exit code 4: no message\n" in done.stderr
    assert serves(instance)


_OF_ANOTHER_VERSION = """
from typing import Literal
from titus_py.supervisor import succession
succession.Legacy.__annotations__["version"] = Literal[5]
succession.Legacy.model_fields["version"].annotation = Literal[5]
succession.Legacy.model_rebuild(force=True)
"""


@pytest.mark.parametrize(
    ("statements", "words"),
    [
        ("import no_such_module", "failed: ModuleNotFoundError: No module named 'no_such_module'"),
        ("import os; os.abort()", "failed: it gave no reason"),
        (_OF_ANOTHER_VERSION, "would leave to it, version (Input should be 5): only a restart"),
    ],
    ids=["incomplete", "killed", "too new"],
)
def test_a_program_that_cannot_take_over_is_not_executed(
    serve: Serve, patient: str, program: Program, statements: str, words: str
) -> None:
    instance = serve(patient, program=program.path)
    processes = generation_processes(instance)
    descriptors = instance.supervisor().descriptors
    program.install(statements)
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        (reason,) = why_not(instance)
        assert words in reason
        assert generation_processes(instance) == processes
        assert talk(client)
        assert serves(instance)
        eventually(
            lambda: instance.supervisor().descriptors == descriptors, "descriptors as before"
        )
        program.install("")
        assert reload_program(instance)["reloaded"]
        assert talk(client)


def test_a_mistaken_configuration_keeps_the_program_that_serves(
    serve: Serve, patient: str, program: Program
) -> None:
    instance = serve(patient, program=program.path)
    processes = generation_processes(instance)
    edit(instance, lambda tables: tables["worker"].update(maximum=3, drain="long"))
    reasons = why_not(instance)
    assert len(reasons) == 2
    assert all(str(instance.directory / "titus.toml") in reason for reason in reasons)
    assert not instance.events_named("program_changed")
    assert generation_processes(instance) == processes
    assert serves(instance)


def test_a_program_that_comes_no_further_serves_what_was_served(
    serve: Serve, patient: str, program: Program
) -> None:
    """The configuration is spoilt in between: the old generation is the new program's, in full."""
    instance = serve(patient, program=program.path)
    instance.expected_alarms |= {"parent_died", "keyd_died"}
    file = instance.directory / "titus.toml"
    good = file.read_bytes()
    spoil = f"open({str(file)!r}, 'w').write('[worker')"
    program.install(f"import os\nif 'TITUS_PY_LEGACY' in os.environ: {spoil}")
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        processes = generation_processes(instance)
        (reason,) = why_not(instance)
        assert "not valid TOML" in reason
        assert instance.wait_for_event("program_changed")
        assert generation_processes(instance) == processes
        assert talk(client)
        assert serves(instance)
        # What ends of it is started anew.
        for child in (instance.keyd(), instance.parent()):
            since = len(instance.events())
            child.kill()
            instance.wait_for_event("keyd_started", since=since)
            assert serves(instance)
        replace(file, good)
        program.install("")
        assert reload_program(instance)["reloaded"]
        assert serves(instance)


def test_what_is_asked_for_meanwhile_is_done_by_the_new_program(
    serve: Serve, patient: str, program: Program, tmp_path: Path
) -> None:
    """Signals, reloads, questions: whenever they come."""
    instance = serve(patient, program=program.path)
    begun = tmp_path / "begun"
    program.install(
        "import os, time\nif 'TITUS_PY_LEGACY' in os.environ:\n"
        f"    open({str(begun)!r}, 'w').close()\n    time.sleep(1)\n"
    )
    with ThreadPoolExecutor() as pool:
        reloads = pool.submit(reload_program, instance)
        instance.wait_for_event("reloading")
        later = pool.submit(reload, instance)
        eventually(begun.exists, "the new program")
        instance.signal(signal.SIGHUP)
        told = pool.submit(status, instance)
        assert reloads.result(PATIENCE) == {"reloaded": True, "generation": 2}
        assert later.result(PATIENCE)["reloaded"]
        assert told.result(PATIENCE)["pid"] == instance.pid
        begun.unlink()
        reloads = pool.submit(reload_program, instance)
        eventually(begun.exists, "the new program")
        instance.signal(signal.SIGTERM)
        assert instance.wait(PATIENCE) == 0
    instance.assert_nothing_is_left()


def test_who_asked_may_hang_up_meanwhile(
    serve: Serve, patient: str, program: Program, tmp_path: Path
) -> None:
    """The program changes all the same, and what it changes to can be stopped."""
    instance = serve(patient, program=program.path)
    begun = tmp_path / "begun"
    program.install(
        "import os, time\nif 'TITUS_PY_REHEARSAL' in os.environ:\n"
        f"    open({str(begun)!r}, 'w').close()\n    time.sleep(1)\n"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asks:
        asks.connect(str(control_path(instance.pid)))
        asks.send(b'{"do": "reload program"}')
        eventually(begun.exists, "the new program, tried out")
    instance.wait_for_event("program_changed")
    instance.wait_for_event("reloaded", generation=2)
    assert serves(instance)
    assert not instance.events_named("reload_failed")
    assert instance.terminate() == 0


def test_uids_are_handed_on(serve: Serve, patient: str, program: Program) -> None:
    """The uids of a generation that has ended, and of one that has not, stay its own."""
    instance = serve(patient, program=program.path, worker={"max": Uids.SIZE // 3 - 60, "spare": 4})
    with TlsClient(instance.port) as first, TlsClient(instance.port) as second:
        assert talk(first.handshake())
        assert talk(second.handshake())
        assert reload_program(instance)["reloaded"]
        # Their backend lets go of who says nothing for ten seconds.
        assert talk(first)
        assert talk(second)
        with TlsClient(instance.port) as third:
            assert talk(third.handshake())
            assert reload_program(instance)["reloaded"]
            assert all(talk(client) for client in (first, second, third))
            uids = [one.uid for one in instance.processes() if one.uid in instance.uids[:-1]]
            assert len(set(uids)) == len(uids)
            (reason,) = why_not(instance)
            assert reason.startswith("worker.uids: connections of earlier generations")
            assert all(talk(client) for client in (first, second, third))
            assert serves(instance)
    no_earlier_generation(instance)
    eventually(lambda: reload_program(instance)["reloaded"], "uids for another")


def test_the_service_manager_is_told_as_of_any_reload(
    serve: Serve,
    patient: str,
    program: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(PATIENCE)

        def hear(word: str) -> str:
            while word not in (heard := manager.recv(4096).decode()):
                continue
            return heard

        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        monkeypatch.setenv("WATCHDOG_USEC", "4000000")
        instance = serve(patient, program=program.path)
        hear("READY=1")
        with ThreadPoolExecutor() as pool:
            reloads = pool.submit(reload_program, instance)
            now = int(hear("RELOADING=1").partition("MONOTONIC_USEC=")[2].split()[0])
            assert abs(now / 1e6 - time.monotonic()) < PATIENCE
            hear("READY=1")
            assert reloads.result(PATIENCE)["reloaded"]
        hear("WATCHDOG=1")
        hear("STATUS=")


#: What is installed here comes first.
_VERSION = "sys.path.insert(0, {!r})"


def test_after_an_upgrade_any_reload_takes_the_new_program(
    serve: Serve, patient: str, program: Program, tmp_path: Path
) -> None:
    """As if the package had been replaced, and nobody had said --program."""
    installed = tmp_path / "titus_py.dist-info/METADATA"
    installed.parent.mkdir()
    installed.write_text("Version: 1.0\n")
    statements = _VERSION.format(str(tmp_path))
    program.install(statements)
    instance = serve(patient, program=program.path)
    marker = tmp_path / "new-one"
    program.install(f"{statements}\nopen({str(marker)!r}, 'w').close()")
    assert reload(instance) == {"reloaded": True, "generation": 2}
    assert not marker.exists(), "a reload of the same version"
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        installed.write_text("Version: 2.0\n")
        program.install(f"{statements}\nsys.exit('it is broken')")
        failed = reload(instance)
        assert failed == {"reloaded": False, "problems": ["the new program failed: it is broken"]}
        assert status(instance)["generations"][-1]["number"] == 2
        assert talk(client)
        assert serves(instance)
        program.install(f"{statements}\nopen({str(marker)!r}, 'w').close()")
        assert reload(instance) == {"reloaded": True, "generation": 3}
        assert marker.exists()
        assert instance.wait_for_event("program_changed")["version"] == "2.0"
        assert talk(client)
        assert serves(instance)


def test_an_audit_of_another_version_asks_keyd_nothing(
    serve: Serve, patient: str, program: Program
) -> None:
    """It would ask from the parent's own socket, and keyd would hang up on that."""
    program.install("from titus_py.supervisor import life; life.CONTROL_VERSION -= 1")
    instance = serve(patient, program=program.path)
    command = [TITUS_PY, "audit", f"--pid={instance.pid}", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    (made,) = json.loads(done.stdout)
    seen = {one["seen"] for one in made["findings"] if one["check"].startswith("refuses")}
    assert seen == {
        "it is of another version than this audit: restart titus-py, if it was upgraded"
    }
    assert not instance.events_named("audit_refused")
    assert serves(instance)
