"""Which processes are audits', while other locks come and go."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from keyd.inspection import auditors

#: More than there is room for in one piece of /proc/locks.
_COME_AND_GO = """
import fcntl, os, sys
files = [os.open(f"{sys.argv[1]}/{number}", os.O_CREAT | os.O_RDWR) for number in range(200)]
print("ready", flush=True)
while True:
    for file in files:
        fcntl.flock(file, fcntl.LOCK_EX)
    for file in files:
        fcntl.flock(file, fcntl.LOCK_UN)
"""
_AUDIT = """
import signal, sys
from keyd.inspection import auditors
auditors._LOCK = sys.argv[1] + "/audits.lock"
auditors.join()
print("ready", flush=True)
signal.pause()
"""


@contextmanager
def running(program: str, directory: Path) -> Iterator[int]:
    """Once it is ready."""
    command = [sys.executable, "-c", program, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(auditors, "_LOCK", str(tmp_path / "audits.lock"))
    return tmp_path


def test_one_is_never_missed(directory: Path) -> None:
    with ExitStack() as stack:
        other = stack.enter_context(running(_COME_AND_GO, directory))
        assert not auditors.is_one(other)
        audit = stack.enter_context(running(_AUDIT, directory))
        assert all(auditors.is_one(audit) for _ in range(4000))
        assert not auditors.is_one(other)
    assert not auditors.is_one(audit)
