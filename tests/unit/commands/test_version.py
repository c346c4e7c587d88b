"""Which version it is: of the program, and of the library that a hole would be in."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from OpenSSL import SSL


@pytest.mark.parametrize("program", ["titus-py", "keyd"])
def test_version(program: str) -> None:
    path = Path(sys.executable).with_name(program)
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    openssl = SSL.OpenSSL_version(SSL.OPENSSL_VERSION).decode()
    assert done.stdout.splitlines() == [f"{program} {version('titus-py')}", openssl]


@pytest.mark.parametrize("program", ["titus-py", "keyd"])
def test_what_cannot_be_written_is_told_of(program: str) -> None:
    """A report for a file whose disk is full."""
    path = Path(sys.executable).with_name(program)
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [path, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    said = f"{program}: standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)
