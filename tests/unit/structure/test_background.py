"""The tests as a script runs them in the background, where interrupts are ignored."""

import signal
import subprocess
import sys
from pathlib import Path

_REPOSITORY = Path(__file__).parents[3]


def test_a_background_job_passes_what_is_interrupted() -> None:
    """A job of a shell that is not interactive (POSIX, "Shell Command Language", 2.11)."""

    def ignore() -> None:
        for number in (signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)

    files = ["tests/unit/commands/test_status.py", "tests/unit/configuration/test_check.py"]
    options = ["-q", "-p", "no:cacheprovider", "-k", "test_watching or test_no_core"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=_REPOSITORY,
        preexec_fn=ignore,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout
