"""Another version is installed, the one before still runs, and loses a process.

As between the unpacking of a package and what its script does then, or for as long as an
administrator puts that off. What the process is started from is the other version by then, and
what that says or expects is not what the supervisor's own version does.
"""

import os
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from .conftest import Certificates, Serve
from .installed import Installed
from .instance import Instance, eventually, free_port
from .peers import TlsClient
from .service import FAILS, clients_meanwhile, edit, reload, serves, status, talk
from .test_own_keyd import OwnKeyd


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    return Installed(tmp_path / "installed")


def upgrade(installed: Installed, version: str = "2.0") -> None:
    """To a version whose processes speak otherwise, to each other and to the supervisor."""
    for file, before, after in (
        ("titus_py/parent/life.py", '"ready", vhosts=', '"ready", sites='),
        ("titus_py/supervisor/child_events.py", '"vhosts":', '"sites":'),
        ("titus_py/between/unprivileged.py", 'READY = b"R"', 'READY = b"r"'),
        ("keyd/protocol.py", "CONTROL_VERSION = ", "CONTROL_VERSION = 100 + "),
    ):
        installed.has(file, before, after)
    installed.has("titus_py/__init__.py", "", "")
    installed.is_version(version)


def told(instance: Instance, process: str) -> Any:
    """What the status says of this process."""
    return next(one for one in status(instance)["processes"] if one["process"] == process)


def state(instance: Instance, process: str) -> str:
    return str(told(instance, process)["state"])


def is_mistaken(instance: Instance) -> None:
    """The configuration, by now, so that the other version cannot serve it."""
    edit(instance, lambda tables: tables["worker"].update(drain="long"))


@pytest.mark.parametrize(
    ("version", "mistaken"),
    [("2.0", False), ("2.0", True), ("1.0", False)],
    ids=["", "mistaken", "another build of the same version"],
)
def test_the_parent_is_started_by_the_version_that_it_is_of(
    serve: Serve, patient: str, installed: Installed, version: str, mistaken: bool
) -> None:
    instance = serve(patient, program=installed.titus_py)
    instance.expected_alarms |= {"parent_died"}
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        assert reload(instance)["reloaded"]
        # The log is what tells which parent that is.
        instance.wait_for_event("reloaded")
        upgrade(installed, version)
        if mistaken:
            is_mistaken(instance)
        instance.parent().kill()
        assert serves(instance)
        assert instance.wait_for_event("program_changed", pid=instance.pid)["version"] == version
        assert talk(client), "the generation before goes on"
    assert status(instance)["pid"] == instance.pid


@pytest.mark.parametrize("mistaken", [False, True], ids=["", "mistaken"])
@pytest.mark.parametrize("lost", ["keyd", "fork_server"])
def test_what_a_parent_cannot_go_on_without_comes_with_another_one(
    serve: Serve, patient: str, installed: Installed, lost: str, mistaken: bool
) -> None:
    """The connections of the parent that has lost it go on."""
    instance = serve(patient, program=installed.titus_py)
    instance.expected_alarms |= {f"{lost}_died"}
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        upgrade(installed)
        if mistaken:
            is_mistaken(instance)
        process = instance.keyd() if lost == "keyd" else instance.fork_server()
        process.kill()
        # From now on, clients wait.
        instance.wait_for_event("keyd_lost" if lost == "keyd" else "fork_server_died")
        assert serves(instance)
        assert instance.wait_for_event("program_changed", pid=instance.pid)["version"] == "2.0"
        assert talk(client)
    assert not instance.events_named("keyd_incomprehensible")
    # Of what is mistaken, the administrator is told.
    assert bool(instance.events_named("reload_failed")) == mistaken


def test_workers_that_crash_are_a_reason_as_good(
    serve: Serve, patient: str, installed: Installed
) -> None:
    """An attacker who learns the fork server's layout does not get all the time in the world."""
    begins = "        report.set(server_name=server_name)\n"
    installed.has(
        "titus_py/worker/life.py",
        begins,
        f'{begins}        if server_name == "crash.test":\n            os.abort()\n',
    )
    instance = serve(patient, program=installed.titus_py)
    instance.expected_alarms |= {"handshake_failed"}
    upgrade(installed)
    is_mistaken(instance)
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        three_workers_crash(instance)
        instance.wait_for_event("program_changed")
        instance.wait_for_event("reload_failed")
        three_workers_crash(instance)
        instance.wait_for_event("fork_server_replaced")
        assert talk(client)
        assert serves(instance)


def three_workers_crash(instance: Instance) -> None:
    for _ in range(3):
        with TlsClient(instance.port, server_name="crash.test") as client:
            with pytest.raises(FAILS):
                client.handshake()
            ended = instance.wait_for_event("handshake_failed", client=client.name)
            assert ended["end"].startswith("killed by SIG")


def test_a_parent_that_would_understand_another_keyd_gets_one(
    serve: Serve, patient: str, installed: Installed
) -> None:
    instance = serve(patient, program=installed.titus_py)
    instance.expected_alarms |= {"keyd_died"}
    upgrade(installed)
    installed.has("keyd/protocol.py", "CONTROL_VERSION = 100 + ", "CONTROL_VERSION = ")
    is_mistaken(instance)
    instance.keyd().kill()
    instance.wait_for_event("keyd_lost")
    assert serves(instance)
    assert instance.wait_for_event("program_changed")
    assert len(instance.events_named("parent_started")) == 1


@pytest.mark.parametrize("lost", ["resolver", "metrics"])
def test_a_process_without_privilege_is_started_by_the_version_that_it_is_of(
    serve: Serve, patient: str, installed: Installed, lost: str
) -> None:
    instance = serve(
        patient.replace("127.0.0.1", "localhost"),
        program=installed.titus_py,
        metrics={"address": f"127.0.0.1:{free_port()}"},
    )
    instance.expected_alarms |= {f"{lost}_died", "keyd_died"}
    eventually(lambda: state(instance, lost) == "ready", "a process to lose")
    upgrade(installed)
    is_mistaken(instance)
    os.kill(told(instance, lost)["pid"], signal.SIGKILL)
    instance.wait_for_event("program_changed")
    eventually(lambda: state(instance, lost) == "ready", "its successor")
    # The parent is still of the version before, and serves; until it loses keyd, too.
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        instance.keyd().kill()
        instance.wait_for_event("keyd_lost")
        assert serves(instance)
        assert talk(client)
    assert not instance.events_named("keyd_incomprehensible")


@pytest.mark.parametrize("mistaken", [False, True], ids=["", "mistaken"])
def test_keyd_as_a_unit_of_its_own_is_of_the_other_version_first(
    serve: Serve,
    patient: str,
    installed: Installed,
    certificates: Certificates,
    tmp_path: Path,
    mistaken: bool,
) -> None:
    """Clients wait until that version has taken over, and none meets a keyd that refuses it."""
    site = certificates("P-256", "www.test")
    options = [f"--key={site.key}", f"--chroot={tmp_path / 'root'}", "--user=nobody"]
    with closing(OwnKeyd(tmp_path, options, installed.keyd)) as keyd:
        keyd.start()
        instance = serve(
            patient,
            program=installed.titus_py,
            vhost=[{"certificates": [{"certificate": site.certificate}]}],
            keyd={"socket": keyd.socket},
        )
        with TlsClient(instance.port) as client:
            assert talk(client.handshake())
            upgrade(installed)
            if mistaken:
                is_mistaken(instance)
            keyd.end(signal.SIGTERM)
            instance.wait_for_event("keyd_lost")
            keyd.start()
            with clients_meanwhile(instance, 2) as some_more:
                instance.wait_for_event("program_changed")
                some_more()
            assert talk(client)
            assert len(instance.events_named("keyd_lost")) == 1


def test_one_that_cannot_take_over_is_tried_and_its_processes_after_it(
    serve: Serve, patient: str, installed: Installed
) -> None:
    instance = serve(patient, program=installed.titus_py)
    instance.expected_alarms |= {"parent_died", "keyd_died"}
    installed.has("titus_py/supervisor/succession.py", "Literal[4] = 4", "Literal[5] = 5")
    installed.is_version("2.0")
    for process, heard in ((instance.keyd, "keyd_lost"), (instance.parent, "parent_died")):
        process().kill()
        instance.wait_for_event(heard)
        assert serves(instance)
        assert "only a restart" in instance.events_named("reload_failed")[-1]["problem"]
    assert not instance.events_named("program_changed")
