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


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ("titus-py check /etc/titus-py/titus.toml", "--config FILE"),
        ("titus-py serve --listn :443", "--listen ADDR"),
        ("titus-py keys pin --sni x", "--server-name"),
        ("keyd reference --sockt a b", "CERTIFICATE"),
    ],
)
def test_a_mistake_in_the_options_is_told_with_those_that_there_are(
    arguments: str, option: str
) -> None:
    program, *rest = arguments.split()
    path = Path(sys.executable).with_name(program)
    done = subprocess.run([path, *rest], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert option in " ".join(done.stderr.split())
    command = arguments.partition(" -")[0].partition(" /")[0]
    assert f"{command}: error: unrecognized arguments: " in done.stderr
