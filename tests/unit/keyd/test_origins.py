"""Whose a process is: by its control groups."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import pytest
from integration.instance import eventually

from keyd.inspection import origins
from keyd.inspection.origins import is_of_the_system, may_read, of_root, unit_in, unit_of

OF_A_USER = "/user.slice/user-1000.slice/user@1000.service/app.slice/keyd@nginx.service"


@pytest.mark.parametrize(
    ("groups", "unit"),
    [
        ("0::/system.slice/system-keyd.slice/keyd@nginx.service\n", "keyd@nginx.service"),
        ("1:name=systemd:/system.slice/keyd@a.service\n0::/\n", "keyd@a.service"),
        ("0::/keyd.service\n", "keyd.service"),
        ("0::/\n", ""),
        ("0::/system.slice/docker-4711.scope\n", ""),
        ("0::/user.slice/user-1000.slice/session-1.scope\n", ""),
        # Any user's may have any name.
        (f"0::{OF_A_USER}\n", ""),
        (f"1:name=systemd:{OF_A_USER}\n0::{OF_A_USER}\n", ""),
        ("0::/user.slice/user-1000.slice/user@1000.service\n", ""),
        ("0::/user.slice/user-1000.slice/user@1000.service/x\r0::/system.slice/a.service\n", ""),
    ],
)
def test_a_unit_is_the_systems(groups: str, unit: str) -> None:
    assert unit_in(groups) == unit


@pytest.fixture
def group_of_a_user() -> Iterator[Path]:
    """A control group (version 2) that is called as what a user's service manager has."""
    found = [Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")]
    (parent, *_) = [one for one in found if (one / "cgroup.controllers").exists()] or [None]
    if parent is None or not os.access(parent, os.W_OK):
        pytest.skip("no control groups can be made here")
    group = parent / f"titus-py-{uuid4().hex}" / "user@1000.service"
    group.mkdir(parents=True)
    yield group
    events = group / "cgroup.events"
    eventually(lambda: "populated 0" in events.read_text(), "nothing is in it")
    for directory, _, _ in os.walk(group.parent, topdown=False):
        Path(directory).rmdir()


@pytest.mark.parametrize(
    "end_of_line", [b"\r", b"\x0b", b"\x1c", b"\xc2\x85", b"\xe2\x80\xa8", b"\xff"]
)
def test_no_user_gives_a_control_group_a_name_that_is_two_lines(
    group_of_a_user: Path, end_of_line: bytes
) -> None:
    """The kernel refuses a line feed in it, and nothing else."""
    name = os.fsdecode(b"x" + end_of_line + b"0::")
    group = group_of_a_user / name / "system.slice" / "nginx.service"
    group.mkdir(parents=True)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, user="nobody", cwd="/") as process:
        try:
            (group / "cgroup.procs").write_text(str(process.pid))
        except OSError:
            pytest.skip("no process can be moved here")
        seen = unit_of(process.pid), of_root([process.pid])
        process.communicate()
    assert seen == ("", set())


def test_what_is_roots_for_whoever_runs_it_is_a_users() -> None:
    """Any user can run such a program by another name, with a file of its own open: as a keyd."""
    with TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        program = Path(shutil.copy(shutil.which("cat") or "", directory))
        program.chmod(0o4755)
        secret = Path(directory, "secret")
        secret.touch(mode=0o600)
        with subprocess.Popen([program], stdin=subprocess.PIPE, user="nobody", cwd="/") as process:
            if os.stat(f"/proc/{process.pid}").st_uid:
                pytest.skip("no program is setuid here")
            seen = of_root([process.pid]), is_of_the_system(process.pid)
            may = may_read(process.pid, str(secret))
            process.communicate()
    assert (*seen, may) == (set(), False, False)


def test_all_processes_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that was taken over can have any number of processes that look like keyds."""
    listdir, looked = os.listdir, []

    def listed(path: str) -> list[str]:
        looked.append(path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", listed)
    monkeypatch.setattr(origins, "_is_in_an_empty_root", lambda _: False)
    with ExitStack() as stack:
        processes = {
            stack.enter_context(
                subprocess.Popen(["cat"], stdin=subprocess.PIPE, user="nobody", cwd="/")
            ).pid
            for _ in range(3)
        }
        groups = dict.fromkeys(processes, "0::/system.slice/web.service")
        monkeypatch.setattr(origins, "_control_groups", lambda pid: groups.get(pid, "0::/"))
        assert of_root({*processes, os.getpid()}) == {os.getpid()}
        assert looked == ["/proc"]
        # Alone, each is the whole of its service.
        groups = {pid: f"0::/system.slice/{pid}.service" for pid in processes}
        assert of_root(processes) == processes
        assert looked == ["/proc"] * 2
