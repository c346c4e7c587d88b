"""A process is lost, and the program on disk, which is another one by then, cannot be started.

As while dpkg puts its files in place, or after it has put too few of them there.
"""

import socket
import subprocess
from pathlib import Path

import pytest

from .conftest import Serve
from .installed import Installed
from .instance import PATIENCE, Instance
from .peers import TlsClient
from .service import serves, status, talk
from .test_upgraded_meanwhile import upgrade


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    return Installed(tmp_path / "installed")


def is_patient(installed: Installed, broken: float, end: float) -> None:
    """For so long: then a program that cannot be started counts as broken, or is the end."""
    usual = "_BROKEN_SECONDS, _END_SECONDS = 10.0, 30.0"
    installed.has(
        "titus_py/supervisor/lost.py", usual, usual.replace("10.0, 30.0", f"{broken}, {end}")
    )


def lost_because(instance: Instance) -> str:
    return str(status(instance)["lost_because"])


@pytest.mark.parametrize("without", ["titus_py/supervisor/upkeep.py", "keyd/daemon.py"])
@pytest.mark.parametrize("lost", ["keyd", "fork_server"])
def test_what_serves_goes_on_for_as_long_as_it_takes(
    serve: Serve, patient: str, installed: Installed, lost: str, without: str
) -> None:
    is_patient(installed, 4.0, 5.0)
    instance = serve(patient, program=installed.titus_py)
    instance.expected_alarms |= {f"{lost}_died", "program_broken"}
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        upgrade(installed)
        with installed.without(without):
            process = instance.keyd() if lost == "keyd" else instance.fork_server()
            process.kill()
            told = instance.wait_for_event("program_broken")
            missing = without.removesuffix(".py").replace("/", ".")
            assert f"No module named '{missing}'" in told["reason"]
            assert told["lost"] == lost.replace("_", " ")
            assert status(instance)["lost"] == told["lost"]
            assert lost_because(instance) == told["reason"]
            # Once more, and it goes on.
            since = len(instance.events())
            instance.wait_for_event("reload_failed", since=since)
            assert talk(client)
            assert not instance.events_named("program_changed")
            assert len(instance.events_named("program_broken")) == 1
        assert serves(instance)
        assert instance.wait_for_event("program_changed", pid=instance.pid)["version"] == "2.0"
        assert talk(client)
        assert not lost_because(instance)
    assert not instance.events_named("giving_up")


@pytest.mark.parametrize("away", ["titus_py", "keyd", "../../../bin/python"])
@pytest.mark.parametrize("lost", ["keyd", "parent"])
def test_a_package_that_is_away_for_some_seconds_is_waited_for(
    serve: Serve, patient: str, installed: Installed, lost: str, away: str
) -> None:
    """Or its Python, as after an upgrade of Debian and an `apt autoremove`."""
    # On a busy machine, each trial takes some seconds.
    is_patient(installed, PATIENCE, 2 * PATIENCE)
    instance = serve(patient, program=installed.titus_py)
    instance.expected_alarms.add(f"{lost}_died")
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        with installed.without(away):
            process = instance.keyd() if lost == "keyd" else instance.parent()
            process.kill()
            # After half a second, and then after a whole one.
            instance.wait_for_events(3, "reload_failed")
        assert serves(instance)
        assert lost == "parent" or talk(client)
    # What is there again is what was there before. Nobody has asked for a reload.
    assert not instance.events_named("reloaded")
    assert not instance.events_named("program_changed")
    assert instance.wait_for_event(f"{lost}_died")
    assert status(instance)["pid"] == instance.pid


def test_a_trial_during_which_files_are_replaced_does_not_count(
    serve: Serve, patient: str, installed: Installed, tmp_path: Path
) -> None:
    """What was tried out is not what would be executed."""
    instance = serve(patient, program=installed.titus_py)
    instance.expected_alarms.add("keyd_died")
    upgrade(installed)
    begins = "import argparse\n"
    replaces = (
        f"import os, pathlib\nonce = pathlib.Path({str(tmp_path / 'once')!r})\n"
        "if 'TITUS_PY_REHEARSAL' in os.environ and not once.exists():\n"
        "    once.touch()\n    os.utime(pathlib.Path(__file__).with_name('__init__.py'))\n"
    )
    installed.has("titus_py/__main__.py", begins, begins + replaces)
    instance.keyd().kill()
    failed = instance.wait_for_event("reload_failed")
    assert failed["problem"] == "the new program was replaced while it was tried out"
    assert instance.wait_for_event("program_changed")["version"] == "2.0"
    assert serves(instance)
    assert len(instance.events_named("keyd_died")) == 1


def test_what_serves_nobody_ends(serve: Serve, patient: str, installed: Installed) -> None:
    """A restart cannot do better, but whoever watches sees it, and clients go elsewhere."""
    is_patient(installed, 1.0, 4.0)
    instance = serve(patient, program=installed.titus_py)
    instance.expected_alarms |= {"parent_died", "program_broken", "giving_up"}
    with installed.without("titus_py/parent/life.py"):
        instance.parent().kill()
        instance.wait_for_event("reload_failed")
        with socket.create_connection(("127.0.0.1", instance.port), PATIENCE):
            assert instance.wait() == 1
    (end,) = instance.events_named("giving_up")
    assert "No module named 'titus_py.parent.life'" in end["reason"]
    assert instance.events_named("program_broken")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", instance.port), PATIENCE)


def test_where_only_a_restart_helps_it_comes_however_slow_the_program_is(
    serve: Serve, patient: str, installed: Installed
) -> None:
    """The new program can start, but not take over, and the old one cannot use its keyd."""
    instance = serve(patient, program=installed.titus_py)
    instance.expected_alarms |= {"keyd_died", "giving_up"}
    instance.expected_alarms.add("connection_ended")
    installed.has("titus_py/supervisor/succession.py", "Literal[4] = 4", "Literal[5] = 5")
    installed.has(
        "titus_py/__main__.py", "import argparse\n", "import argparse, time\ntime.sleep(6)\n"
    )
    installed.has("keyd/serve.py", "import argparse\n", "import argparse\nraise SystemExit(1)\n")
    installed.is_version("2.0")
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        instance.keyd().kill()
        assert instance.wait() == 1
    assert len(instance.events_named("keyd_died")) == 3
    assert instance.events_named("giving_up")


def test_a_start_that_could_not_look_at_the_keys_is_not_the_configurations_fault(
    serve: Serve, patient: str, installed: Installed
) -> None:
    """Else systemd, which tries no mistaken configuration again, would not start it any more."""
    instance = serve(patient, program=installed.titus_py)
    instance.terminate()
    command = [installed.titus_py, "serve", "--config", instance.directory / "titus.toml"]
    with installed.without("keyd/checking.py"):
        ended = subprocess.run(
            command, timeout=PATIENCE, stderr=subprocess.PIPE, text=True, check=False
        )
    assert "No module named 'keyd.checking'" in ended.stderr
    assert ended.returncode == 1
