"""Whose a process is: by its control groups."""

import os
import subprocess
from contextlib import ExitStack

import pytest

from keyd.inspection import origins
from keyd.inspection.origins import of_root, unit_in

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
    ],
)
def test_a_unit_is_the_systems(groups: str, unit: str) -> None:
    assert unit_in(groups) == unit


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
