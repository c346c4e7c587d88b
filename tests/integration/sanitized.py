"""Extensions in C under sanitizers, and the programs that try them."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from provider.support import SANITIZE, check_sanitizer, preload_sanitizer

__all__ = ["said_by", "sanitized"]

_REPOSITORY = Path(__file__).parents[2]
_WARNINGS = ("-std=c11", "-Wall", "-Wextra", "-Werror")


def sanitized(output: Path, *sources: str) -> Path:
    """Compile an extension with the sanitizers, from these sources of the repository."""
    include = f"-I{sysconfig.get_path('include')}"
    command = ["gcc", *_WARNINGS, "-fPIC", *SANITIZE, include, "-shared", "-o", str(output)]
    subprocess.run([*command, *sources], check=True, cwd=_REPOSITORY)
    assert b"__asan_report" in output.read_bytes()
    return output


def said_by(program: Path, *arguments: str | Path, preload: bool, code: int = 0) -> str:
    """What the program prints, that ends with this code; no sanitizer has anything to say.

    ``preload``: the extensions that it loads have the sanitizers, and Python does not.
    """
    done = subprocess.run(
        [sys.executable, program, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=_REPOSITORY,
        env={**os.environ, "PYTHONPATH": ".", **(preload_sanitizer() if preload else {})},
        timeout=240,
    )
    check_sanitizer(done.stderr)
    assert (done.returncode, done.stderr) == (code, "")
    return done.stdout
