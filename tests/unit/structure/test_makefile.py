"""What `make` chooses to do, asked of make itself in a directory where it can do no harm."""

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[3] / "Makefile"
BEFORE, AFTER = 'ID=debian\nVERSION_ID="12"\n', 'ID=debian\nVERSION_ID="13"\n'
TESTING = "ID=debian\nVERSION_CODENAME=forky\n"
_OURS = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "pyproject.toml").write_text('version = "0.1.0"\n')
    return tmp_path


def make(clone: Path, *arguments: str, release: str = BEFORE) -> str:
    """What make says, on a machine of this release of Debian's."""
    (clone / "os-release").write_text(release)
    script = 'mount --bind os-release /etc/os-release && exec make --no-print-directory "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "make", *arguments]
    answer = subprocess.run(
        command, cwd=clone, env=_OURS, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def package(clone: Path, release: str, revision: int) -> str:
    shows = "--eval=shown: ; @echo $(DEB)"
    return make(clone, shows, "shown", f"REVISION={revision}", release=release).strip()


def version(clone: Path, release: str, revision: int) -> str:
    return package(clone, release, revision).split("_")[1]


def test_the_next_releases_package_is_an_upgrade_whatever_the_revision_was(clone: Path) -> None:
    """Also from those whose version did not name the release, or named it last."""
    rising = [
        "0.1.0-1",
        "0.1.0-2",
        "0.1.0-2+debian13",
        version(clone, BEFORE, 1),
        version(clone, BEFORE, 2),
        version(clone, AFTER, 1),
        version(clone, TESTING, 1),
    ]
    for lower, higher in itertools.pairwise(rising):
        command = ["dpkg", "--compare-versions", lower, "lt", higher]
        assert subprocess.run(command, check=False).returncode == 0, (lower, higher)


def test_one_package_is_left(clone: Path) -> None:
    """What the documentation has installed is ``build/titus-py_*.deb``."""
    made = package(clone, BEFORE, 1)
    earlier = "build/titus-py_0.1.0-1_amd64.deb", "build/titus-py_0.1.0-1+debian12_amd64.deb"
    (clone / "build").mkdir()
    for file in (*earlier, made, "build/other.deb"):
        (clone / file).touch()
    make(clone, f"--assume-old={made}", "deb")
    assert {file.name for file in (clone / "build").iterdir()} == {Path(made).name, "other.deb"}


@pytest.mark.parametrize(
    ("python", "anew"),
    [("echo python3.11", False), ("echo python3.13", True), ("false", False)],
    ids=["the same", "another one", "none"],
)
def test_an_environment_of_another_python_is_made_anew(
    clone: Path, python: str, anew: bool
) -> None:
    (clone / ".venv/lib/python3.11").mkdir(parents=True)
    (clone / "python").write_text(f"#!/bin/sh\n{python}\n")
    (clone / "python").chmod(0o755)
    seen = make(clone, "--dry-run", "PYTHON=./python", ".venv/build-packages")
    assert ("rm -rf .venv" in seen) == anew
