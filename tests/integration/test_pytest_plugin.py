"""The pytest plugin, as its documentation says, in a project that has nothing else."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from titus_py import pytest_plugin

REPOSITORY = Path(__file__).parents[2]
DOCUMENTATION = REPOSITORY / "docs" / "pytest-plugin.md"
DRIVER = REPOSITORY / "tests" / "isolation" / "breakages.py"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Nothing but the documentation's example."""
    (example,) = re.findall(r"^```python\n(.*?)^```$", DOCUMENTATION.read_text(), re.M | re.S)
    (tmp_path / "test_tls.py").write_text(example)
    return tmp_path


def run_pytest(project: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    return subprocess.run(
        command, cwd=project, capture_output=True, text=True, timeout=280, check=False
    )


def test_the_documented_example_passes(project: Path) -> None:
    answer = run_pytest(project, "-W", "error", "--capture=no")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "3 passed" in answer.stdout
    # What its backend says of a connection that does not end as it should.
    assert "Exception" not in answer.stdout + answer.stderr


def test_a_key_in_the_fork_server_is_found_and_its_place_is_said(project: Path) -> None:
    """The fork server is made to load the key, by the driver of the audit's own tests."""
    (project / "conftest.py").write_text(
        f"""\
import sys
import pytest
from titus_py.audit import throwaway


@pytest.fixture(autouse=True)
def fork_server_loads_the_key(tmp_path_factory, monkeypatch):
    mktemp = tmp_path_factory.mktemp

    def make(name):
        directory = mktemp(name)
        driver = [sys.executable, "-I", {str(DRIVER)!r}, "supervisor", "fork_server_loads_the_key"]
        monkeypatch.setattr(throwaway, "PROGRAM", (*driver, str(directory / "site.key")))
        return directory

    monkeypatch.setattr(tmp_path_factory, "mktemp", make)
"""
    )
    answer = run_pytest(project)
    assert answer.returncode == 1
    # What it serves it still serves.
    assert "1 passed" in answer.stdout
    assert "2 failed" in answer.stdout
    errors = re.findall(r"^E +(.*)$", answer.stdout, re.M)
    places = [
        line
        for line in errors
        if re.match(r"fork server \d+: key: .* seen: .* in \S+ at 0x[0-9a-f]+ of process \d+", line)
    ]
    assert len(places) == 2, "\n".join(errors)
    assert any(re.match(r"worker \d+.*: key: ", line) for line in errors)
    assert not any(re.match(r"(keyd|supervisor) \d+", line) for line in errors)


def test_it_is_loaded_everywhere_and_imports_nothing(tmp_path: Path) -> None:
    """What is heavy comes with the first test that asks for an instance."""
    entries = importlib.metadata.entry_points(group="pytest11")
    assert "titus_py.pytest_plugin" in {entry.value for entry in entries}
    (tmp_path / "test_imports.py").write_text(
        "import sys\n\n\n"
        "def test_imports():\n"
        "    ours = {name for name in sys.modules if name.split('.')[0] in ('titus_py', 'keyd')}\n"
        "    assert ours == {'titus_py', 'titus_py.pytest_plugin'}\n"
        "    assert not {'cryptography', 'OpenSSL', 'pydantic', 'rich'} & set(sys.modules)\n"
    )
    answer = run_pytest(tmp_path)
    assert answer.returncode == 0, answer.stdout


def test_without_root_a_test_fails_and_says_why(project: Path, tmp_path: Path) -> None:
    """As uid 0 without being it: root's files stay readable, and geteuid says otherwise."""
    (project / "conftest.py").write_text("import os\n\nos.geteuid = lambda: 1000\n")
    answer = run_pytest(project)
    assert answer.returncode == 1
    assert "started as root" in answer.stdout
    assert "passed" not in answer.stdout.splitlines()[-1]
    assert "skipped" not in answer.stdout.splitlines()[-1]


def test_every_public_name_is_documented() -> None:
    text = DOCUMENTATION.read_text()
    for name in ("audit", "assert_key_isolated", "titus_instance"):
        assert f"**`{name}" in text
        assert name in pytest_plugin.__all__
        assert getattr(pytest_plugin, name).__doc__
