"""What nobody foresaw, behind keyd's filter: it is said in a line, and no file is opened."""

import subprocess
import sys
from pathlib import Path

_CONFINED = """
import gc, sys, threading
from keyd.linux import seccomp
from keyd.system_calls import SERVING
from keyd.words import end_at_the_unforeseen, say

program = seccomp.Program(seccomp.build(SERVING))
end_at_the_unforeseen()

class Fails:
    def __del__(self):
        raise LookupError("within __del__")

class NoWords:
    encoding = "utf-8"
    def write(self, text):
        raise MemoryError
    flush = write

class FailsWithNoWords:
    def __del__(self):
        raise LookupError(NoWords())

NoWords.__str__ = NoWords.flush

seccomp.install(program)
"""


def run(directory: Path, then: str) -> tuple[int, str]:
    file = directory / "confined.py"
    file.write_text(_CONFINED + then)
    command = [sys.executable, "-I", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_what_python_ignores_ends_nothing(tmp_path: Path) -> None:
    code, said = run(tmp_path, "Fails()\nsay('goes on')\nraise LookupError('no more')")
    assert code == 1
    ignored, goes_on, ends = said.splitlines()
    assert ignored.startswith("keyd: ignored: LookupError: within __del__ at ")
    assert goes_on == "keyd: goes on"
    assert ends.startswith("keyd: LookupError: no more at ")


def test_it_ends_also_where_there_is_no_memory_to_say_why(tmp_path: Path) -> None:
    assert run(tmp_path, "sys.stderr = NoWords()\nraise LookupError") == (1, "")


def test_what_cannot_be_said_for_want_of_memory_ends_nothing(tmp_path: Path) -> None:
    """Python says that its hook has failed, and would open the files of a traceback for that."""
    code, said = run(tmp_path, "FailsWithNoWords()\nsay('goes on')\nraise LookupError('no more')")
    assert code == 1
    *_, goes_on, ends = said.splitlines()
    assert goes_on == "keyd: goes on"
    assert ends.startswith("keyd: LookupError: no more at ")


def test_it_is_one_line_whatever_it_is_about(tmp_path: Path) -> None:
    code, said = run(tmp_path, "raise LookupError('first\\nkeyd: second\\x1b')")
    assert code == 1
    assert said.startswith("keyd: LookupError: first?keyd: second? at ")
    assert len(said.splitlines()) == 1
