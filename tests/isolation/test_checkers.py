"""What a file with an attack in it could do when it is checked: each is attempted, after a control.

In the real checkers, as root, at the place where they parse what they have read.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keyd.linux import landlock

from .test_resolver import things

__all__ = ["things"]

PROGRAM = Path(__file__).with_name("infected_parser.py")
SETTINGS = ["TLSv1.2", "TLSv1.3", None, None, None, False, None, False]
#: By checker: what it is asked, with a file that is there in place of FILE.
QUESTIONS: dict[str, Any] = {
    "keyd check": [{"certificate": "FILE", "key": None}],
    "handshake check": [{"settings": SETTINGS, "certificates": []}],
    "client authorities": [{"ca": "FILE", "crl": None, "whose": "clients"}],
    "revocations": {"lists": "", "certificates": []},
}


def checked(
    checker: str, things: dict[str, str], confinement: str
) -> "subprocess.CompletedProcess[bytes]":
    question = json.dumps(QUESTIONS[checker]).replace("FILE", things["file"])
    settings = json.dumps({"confinement": confinement, **things})
    return subprocess.run(
        [sys.executable, "-I", PROGRAM, checker, settings],
        input=question.encode(),
        capture_output=True,
        check=False,
        timeout=240,
    )


@pytest.mark.parametrize("checker", QUESTIONS)
def test_it_can_do_nothing_but_answer(checker: str, things: dict[str, str]) -> None:
    ran = checked(checker, things, "real")
    assert ran.returncode == 0, ran.stderr.decode()
    possible = {name for name, error in json.loads(ran.stdout).items() if not error}
    if checker == "handshake check":
        # For a certificate, which it gives to OpenSSL as a file.
        possible.remove("share memory")
        if not landlock.version():
            possible -= {name for name in possible if name.startswith("read ")}
    assert possible == set()


def test_without_its_confinement_it_can_do_all_of_it(things: dict[str, str]) -> None:
    """The control."""
    ran = checked("keyd check", things, "none")
    assert ran.returncode == 0, ran.stderr.decode()
    assert {name: error for name, error in json.loads(ran.stdout).items() if error} == {}


@pytest.mark.parametrize("checker", QUESTIONS)
def test_what_cannot_be_confined_parses_nothing(checker: str, things: dict[str, str]) -> None:
    ran = checked(checker, things, "fails")
    assert (ran.returncode, ran.stdout) == (1, b"")
    assert ran.stderr.decode().splitlines()[-1].endswith("no filter")
