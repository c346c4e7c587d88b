"""Uids that are held: ranges that overlap, whose they are, and until when."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from integration.instance import eventually

from titus_py.configuration.held_uids import (
    Held,
    HeldUids,
    holder,
    is_running,
    process_with,
)

#: Holds a range, says so, and waits; executes itself anew when it hears anything.
HOLDER = """\
import os, sys
from pathlib import Path
from titus_py.configuration.held_uids import HeldUids
path, first, last, file, inherited = sys.argv[1:]
held = HeldUids(int(inherited), Path(path))
if int(inherited) < 0:
    held.hold(range(int(first), int(last) + 1), None, file)
print(flush=True)
sys.stdin.readline()
os.set_inheritable(held.descriptor, True)
words = [sys.executable, "-c", os.environ["SELF"], path, first, last, file, str(held.descriptor)]
os.execv(sys.executable, words)
"""

Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    started = []

    def hold(uids: range, file: str) -> "subprocess.Popen[str]":
        words = [tmp_path / "uids", uids[0], uids[-1], file, -1]
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"SELF": HOLDER, "PYTHONPATH": str(Path(__file__).parents[3])},
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_ranges_that_overlap_exclude_each_other(tmp_path: Path, hold: Hold) -> None:
    path = tmp_path / "uids"
    other = hold(range(2_100_000_000, 2_100_001_000), "/etc/titus-py/shop.toml")
    for overlapping in (
        range(2_100_000_000, 2_100_001_000),
        range(2_100_000_999, 2_100_002_000),
        range(1, 2_100_000_001),
        range(2_100_000_500, 2_100_000_501),
    ):
        with pytest.raises(Held, match=f"/etc/titus-py/shop.toml, process {other.pid}$"):
            HeldUids(path=path).hold(overlapping, None, "/etc/titus-py/titus.toml")
        found = holder(overlapping, path)
        assert found is not None
        assert (found.pid, found.file, found.shared) == (
            other.pid,
            "/etc/titus-py/shop.toml",
            False,
        )
        assert found.is_ours("/etc/titus-py/shop.toml")
        assert not found.is_ours("/etc/titus-py/titus.toml")
    held = HeldUids(path=path)
    held.hold(range(2_100_001_000, 2_100_002_000), 5, "/etc/titus-py/titus.toml")
    held.hold(range(1_000_000, 1_000_100), 6, "/etc/titus-py/titus.toml")
    # One's own, which may also change.
    held.hold(range(1_000_050, 1_000_200), 6, "/etc/titus-py/titus.toml")
    os.close(held.descriptor)


def test_they_are_held_until_the_process_ends_and_over_an_execve(
    tmp_path: Path, hold: Hold
) -> None:
    path, uids = tmp_path / "uids", range(4_000_000_000, 4_000_001_000)
    other = hold(uids, "/etc/one.toml")
    assert is_running("/etc/one.toml", path)
    assert not is_running("/etc/other.toml", path)
    assert other.stdin is not None
    assert other.stdout is not None
    other.stdin.write("\n")
    other.stdin.flush()
    assert other.stdout.readline() == "\n"
    found = holder(uids, path)
    assert found is not None
    assert found.pid == other.pid
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert holder(uids, path) is None
    assert not is_running("/etc/one.toml", path)
    held = HeldUids(path=path)
    held.hold(uids, None, "")
    found = holder(uids, path)
    assert found is not None
    assert (found.pid, found.file) == (os.getpid(), "")
    os.close(held.descriptor)


def test_keyds_user_may_be_several_instances_but_no_workers(tmp_path: Path) -> None:
    path = tmp_path / "uids"
    one, two = HeldUids(path=path), HeldUids(path=path)
    one.hold(range(1000, 1100), 50, "/one")
    two.hold(range(2000, 2100), 50, "/two")
    found = holder(range(50, 51), path)
    assert found is not None
    assert found.shared
    with pytest.raises(Held):
        HeldUids(path=path).hold(range(3000, 3100), 1005, "/three")
    with pytest.raises(Held):
        HeldUids(path=path).hold(range(40, 60), 3200, "/four")
    for held in (one, two):
        os.close(held.descriptor)


ranges = st.tuples(st.integers(1, 60), st.integers(1, 30)).map(
    lambda pair: range(pair[0], pair[0] + pair[1])
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(ranges, max_size=6), st.booleans())
def test_the_kernel_sees_each_overlap(tmp_path: Path, wanted: list[range], upper: bool) -> None:
    path = tmp_path / "uids"
    path.unlink(missing_ok=True)
    base = upper * (2**32 - 200)
    taken: list[range] = []
    holding = []
    for uids in wanted:
        moved = range(base + uids.start, base + uids.stop)
        held = HeldUids(path=path)
        holding.append(held)
        free = not any(set(moved) & set(other) for other in taken)
        try:
            held.hold(moved, None, "")
        except Held:
            assert not free
        else:
            assert free
            taken.append(moved)
    for held in holding:
        os.close(held.descriptor)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]\n", b'{"pid": "x", "file": 3}\n', b"\xff" * 200]
)
def test_whatever_the_file_holds(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "uids"
    held = HeldUids(path=path)
    held.hold(range(1000, 2000), None, "/one")
    os.pwrite(held.descriptor, b"\0" * 1000, 1000)
    os.pwrite(held.descriptor, content, 1000)
    found = holder(range(1500, 1501), path)
    assert found is not None
    assert "another instance" in str(found)
    os.close(held.descriptor)
    assert holder(range(1500, 1501), path) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's process is started")
def test_a_uid_that_a_process_has(tmp_path: Path) -> None:
    for uid in (1_999_999_123, 4_099_999_123):
        other = subprocess.Popen(["sleep", "60"], user=uid, cwd=tmp_path.anchor)
        try:
            assert process_with(range(uid - 5, uid + 5)) == uid
            assert process_with(range(uid + 1, uid + 5)) is None
            started = time.monotonic()
            assert process_with(range(uid, uid + 1), patience=0.2) == uid
            assert time.monotonic() - started >= 0.2
        finally:
            other.kill()
            other.wait()
        assert process_with(range(uid, uid + 1), patience=10) is None


#: As another user; the first thread ends before the second, or after it.
ENDS = """\
import ctypes, os, sys, threading, time
uid, first = map(int, sys.argv[1:])
os.setresuid(uid, uid, uid)
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
if first:
    ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's process is started")
@pytest.mark.parametrize("uid", [1_999_998_124, 4_099_998_124])
def test_a_zombie_has_no_uid(uid: int) -> None:
    command = [sys.executable, "-c", ENDS, str(uid)]
    with subprocess.Popen([*command, "0"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert "\nState:\tZ" in Path(f"/proc/{ended.pid}/status").read_text()
        assert process_with(range(uid - 5, uid + 5)) is None
        with subprocess.Popen([*command, "1"]) as half_ended:
            status = Path(f"/proc/{half_ended.pid}/status")
            eventually(lambda: "\nState:\tZ" in status.read_text(), "the first thread's end")
            assert process_with(range(uid - 5, uid + 5)) == uid
            half_ended.kill()


def test_a_file_that_was_removed_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "run" / "uids"
    ours, others = HeldUids(path=path), HeldUids(path=path)
    ours.hold(range(1000, 2000), None, "/etc/ours.toml")
    for file in ("/etc/ours.toml", ""):
        # The next program of this process does not know of the file, which remains.
        shutil.rmtree(path.parent)
        ours.hold(range(1000, 2000), None, file)
    assert is_running("/etc/ours.toml", path)
    with pytest.raises(Held, match=r"/etc/ours\.toml"):
        others.hold(range(1500, 1600), None, "/etc/others.toml")
    for held in (ours, others):
        os.close(held.descriptor)
