"""What keyd says to people is told line by line."""

import io
import subprocess
import sys

import pytest

from keyd.words import TEXT_CHARACTERS, Words, say


def test_lines_are_told_when_they_are_whole() -> None:
    told: list[str] = []
    words = Words(told.append)
    print("keyd: one", file=words)
    words.write("two ")
    assert told == ["one"]
    print("and a half\nthree", file=words, flush=True)
    print("x" * 5000, file=words)
    assert told == ["one", "two and a half", "three", "x" * TEXT_CHARACTERS]


def test_no_other_thread_says_anything_within_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shared(io.StringIO):
        """As if another thread wrote after each piece."""

        def write(self, text: str) -> int:
            return super().write(text) + super().write("keyd: another\n")

    shared = Shared()
    monkeypatch.setattr(sys, "stderr", shared)
    say("one")
    assert shared.getvalue() == "keyd: one\nkeyd: another\n"


def test_standard_error_is_left() -> None:
    program = (
        "import os, sys\n"
        "from keyd.words import leave_standard_error\n"
        "leave_standard_error(lambda line: print(f'told: {line}'))\n"
        "print('keyd: to people', file=sys.stderr)\n"
        "os.write(2, b'forged')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("told: to people\n", "")
