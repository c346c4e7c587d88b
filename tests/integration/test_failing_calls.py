"""A worker whose confinement lacks one call, whichever it is, says nothing and ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = Path(__file__).with_name("failing_calls.py")


def test_a_worker_serves_only_if_none_of_its_calls_fails() -> None:
    done = subprocess.run(
        [sys.executable, _PROGRAM],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_PROGRAM.parents[2])},
        timeout=240,
    )
    said = json.loads(done.stdout)
    # The control: it is ready, and leaves when no client comes.
    assert said.pop("none") == ["R", 0, ""]
    assert len(said) > 12
    for call, (to_its_parent, status, why) in said.items():
        assert (to_its_parent, status) == ("", 70), call
        # The first maps the page where the reason would be.
        assert call == "0 mmap" or why.startswith("OSError: not confined: dup3: "), call
