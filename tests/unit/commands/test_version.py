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
