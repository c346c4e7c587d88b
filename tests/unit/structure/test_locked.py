"""What is installed is what was tested: packaging/locked has each package's version and hashes."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_REPOSITORY = Path(__file__).parents[3]
_LOCKED = sorted((_REPOSITORY / "packaging/locked").glob("*.txt"))
_PIN = re.compile(
    r"([a-z0-9-]+)==(\S+)(?: ; [^\\]+)? \\((?:\n    --hash=sha256:[0-9a-f]{64}(?: \\)?)+)"
)
_PROJECT = tomllib.loads((_REPOSITORY / "pyproject.toml").read_text())
#: What the Debian package for Debian 13 takes from Debian: OpenSSL, and what needs it.
_DEBIANS = {"cryptography", "pyopenssl", "cffi", "pycparser"}


def _pins(file: Path) -> dict[str, str]:
    """The packages of a file and their versions; fails for a line that says anything else."""
    text = re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE)
    assert not _PIN.sub("", text).strip(), file
    return {match[1]: match[2] for match in _PIN.finditer(text)}


@pytest.mark.parametrize("file", _LOCKED, ids=lambda file: file.stem)
def test_each_has_a_version_and_hashes_and_nothing_names_a_server(file: Path) -> None:
    assert _pins(file)


def test_they_are_what_the_project_asks_for() -> None:
    program = _PROJECT["project"]["dependencies"]
    asked = {"build": _PROJECT["build-system"]["requires"], "program": program}
    for extra, packages in _PROJECT["project"]["optional-dependencies"].items():
        asked[extra] = [*program, *packages]
    pins = {file.stem: _pins(file) for file in _LOCKED}
    assert pins.keys() == asked.keys() | {"program-without-openssl"}
    for purpose, requirements in asked.items():
        for requirement in map(Requirement, requirements):
            assert pins[purpose][canonicalize_name(requirement.name)] in requirement.specifier


def test_each_purpose_has_the_program_that_was_tested() -> None:
    program = _pins(_REPOSITORY / "packaging/locked/program.txt")
    for file in _LOCKED:
        if file.stem not in ("build", "program-without-openssl"):
            assert program.items() <= _pins(file).items(), file
    without = _pins(_REPOSITORY / "packaging/locked/program-without-openssl.txt")
    assert without == {name: program[name] for name in program.keys() - _DEBIANS}


@pytest.mark.parametrize("changed", [False, True])
def test_a_file_with_another_hash_is_not_installed(changed: bool, tmp_path: Path) -> None:
    (pin,) = re.findall(
        r"^mdurl==.*(?:\n    --hash.*)+",
        (_REPOSITORY / "packaging/locked/program.txt").read_text(),
        re.M,
    )
    if changed:
        # Of each hash, its last digit.
        pin = re.sub(r"(sha256:.*)([0-9a-f])\b", lambda at: f"{at[1]}{int(at[2], 16) ^ 1:x}", pin)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(pin + "\n")
    command = ["install", "--quiet", "--no-deps", "--require-hashes", "--requirement", requirements]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command, "--target", tmp_path / "installed"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (tmp_path / "installed/mdurl").exists() != changed, done.stderr
    assert (done.returncode == 1) == changed
    assert ("DO NOT MATCH THE HASHES" in done.stderr) == changed
