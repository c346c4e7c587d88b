"""A child that does not end in time is not waited for, and reaped once it has ended."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from integration.tracing import stop_as_traced

from titus_py.supervisor import reaping


@pytest.mark.parametrize("started_by", ["this program", "the one before"])
def test_one_that_ends_late_leaves_no_zombie(
    started_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaping, "_SECONDS", 0.01)
    monkeypatch.setattr(reaping, "_late", [])
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    pidfd = os.pidfd_open(process.pid)
    try:
        child = process if started_by == "this program" else process.pid
        assert reaping.reap(child, pidfd) == "does not end"
        reaping.reap_late()
        assert Path(f"/proc/{process.pid}").exists()
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
        reaping.reap_late()
        assert not Path(f"/proc/{process.pid}").exists()
        assert reaping._late == []
    finally:
        os.close(pidfd)
        # Where it was reaped by its number, Popen does not know.
        process.returncode = process.returncode or -signal.SIGKILL


def test_one_that_stops_as_it_is_traced_has_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaping, "_late", [])
    child = os.fork()
    if not child:
        signal.alarm(60)
        stop_as_traced()
        os._exit(7)
    reaping.inherit([child])
    # Stopped, and not reaped (PTRACE_TRACEME).
    os.waitid(os.P_PID, child, os.WSTOPPED | os.WNOWAIT)
    assert reaping.leave() == [child]
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert reaping.leave() == []
