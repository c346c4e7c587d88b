"""A child that does not end in time is not waited for, and reaped once it has ended."""

import os
import signal
import subprocess
import sys
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
        reaping.leave()
        assert Path(f"/proc/{process.pid}").exists()
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
        reaping.leave()
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


#: As the supervisor, with a child of its own, and with an orphan that leads a session, as what keyd
#: has started does.
_WITH_ORPHANS = """
import os, subprocess
import prctl
from titus_py.supervisor import reaping

def left():
    reaping.reap_orphans()
    return " ".join(sorted(names[pid] for pid in names if os.path.exists(f"/proc/{pid}")))

def orphan(command):
    script = f"{command} <&{goes_on} >/dev/null & echo $!"
    return int(subprocess.check_output(["sh", "-c", script], pass_fds=(goes_on,), process_group=0))

prctl.set_child_subreaper(True)
goes_on, end = os.pipe()
own = subprocess.Popen(["cat"], stdin=goes_on, start_new_session=True)
names = {own.pid: "own", orphan("setsid cat"): "leader"}
os.close(end)
for pid in names:
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
with reaping.reaped_elsewhere():
    print(left())
reaping.note(own.pid)
print(left())
reaping.end_unwatched(own)
print(left())
"""


def test_orphans_are_reaped_and_no_child_of_our_own() -> None:
    command = [sys.executable, "-c", _WITH_ORPHANS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    # Its own child is in front of it, and reaped elsewhere; given up, it is reaped with it.
    assert done.stdout.splitlines() == ["leader own", "leader own", ""]
