"""The units that `make install` and `make deb` write."""

import os
import subprocess
from pathlib import Path

import pytest

_PROGRAM = Path(__file__).parents[3] / "packaging" / "units"


def written(directory: Path, path: str, **more: str) -> dict[str, str]:
    """Each unit's text, by its name; ``path`` is where programs are looked for."""
    directory.mkdir()
    environment = {"PATH": path, "PREFIX": "/usr", "SYSCONFDIR": "/etc", **more}
    subprocess.run([_PROGRAM, directory], env=environment, check=True)
    return {unit.name: unit.read_text() for unit in directory.iterdir()}


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory with what it needs, and with no systemd."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("sh", "sed", "dirname"):
        (directory / name).symlink_to(f"/usr/bin/{name}")
    return directory


@pytest.mark.parametrize("installed", ["systemd 247 (247.3-7)", "systemd 300 (300~rc1)", ""])
def test_what_is_installed_here_has_no_say(tmp_path: Path, programs: Path, installed: str) -> None:
    """The package is the same wherever one release's is built."""
    expected = written(tmp_path / "expected", os.environ["PATH"])
    if installed:
        (programs / "systemctl").write_text(f"#!/bin/sh\necho '{installed}'\n")
        (programs / "systemctl").chmod(0o755)
    assert written(tmp_path / "units", str(programs)) == expected


@pytest.mark.parametrize(("version", "kind"), [("252", "notify"), ("257", "notify-reload")])
def test_a_systemd_that_waits_for_reloads_is_told_to(
    tmp_path: Path, version: str, kind: str
) -> None:
    units = written(tmp_path / "units", os.environ["PATH"], SYSTEMD=version)
    for name in ("titus-py.service", "titus-py@.service"):
        lines = units[name].splitlines()
        assert f"Type={kind}" in lines
        assert ("ReloadSignal=SIGURG" in lines) == (kind == "notify-reload")
    assert "Type=notify" in units["titus-keyd.service"].splitlines()


def test_a_version_that_is_none_is_refused(tmp_path: Path) -> None:
    environment = {**os.environ, "PREFIX": "/usr", "SYSCONFDIR": "/etc", "SYSTEMD": "new"}
    done = subprocess.run(
        [_PROGRAM, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "SYSTEMD=" in done.stderr
    assert not list(tmp_path.iterdir())
