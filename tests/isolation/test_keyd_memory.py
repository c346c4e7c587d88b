"""What keyd's memory is kept from before a key is in it: the disk, and its core's neighbours."""

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import prctl
import pytest
from integration.instance import TITUS_PY, eventually

from keyd.linux.credentials import controllable_speculation
from keyd.linux.sealed import sealed_file
from titus_py.audit.instance import status
from titus_py.audit.memory import _NEVER_SWAPPED, _flagged_mappings

from .held_file import held

KEYD = TITUS_PY.with_name("keyd")


def as_the_supervisor_starts_it(key: Path) -> "subprocess.Popen[bytes]":
    terms = {"uid": 1, "gid": 1, "chroot": "/", "must_lock": True, "filter": ""}
    keys = [{"key": str(key), "passphrase_file": None}]
    settings = sealed_file("settings", json.dumps({**terms, "keys": keys}).encode())
    other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)[0]
    parent, supervisor = other.fileno(), os.dup(other.fileno())
    command = [KEYD, "serve", f"--settings-fd={settings}", f"--parent-fd={parent}"]
    descriptors = settings, parent, supervisor
    started = subprocess.Popen(
        [*command, f"--supervisor-fd={supervisor}"], pass_fds=descriptors, stderr=subprocess.DEVNULL
    )
    other.close()
    os.close(settings)
    os.close(supervisor)
    return started


def as_a_service(key: Path) -> "subprocess.Popen[bytes]":
    command = [KEYD, "control", f"--socket={key.parent}/socket", "--user=games"]
    return subprocess.Popen(
        [*command, f"--chroot={key.parent}/root", f"--key={key}"], stderr=subprocess.DEVNULL
    )


def as_a_check(key: Path) -> "subprocess.Popen[bytes]":
    started = subprocess.Popen(
        [KEYD, "check"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert started.stdin is not None
    files = {"certificate": str(key.with_name("certificate")), "key": str(key)}
    started.stdin.write(json.dumps([files]).encode())
    started.stdin.close()
    return started


@pytest.fixture(
    params=[as_the_supervisor_starts_it, as_a_service, as_a_check],
    ids=["serve", "control", "check"],
)
def keyd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A keyd that is about to open its key file, and is held there."""
    key = tmp_path / "key"
    key.touch(mode=0o600)
    with held(key) as file, request.param(key) as started:
        try:
            assert eventually(file.opener, "keyd opens the key", 30) == started.pid
            yield started
        finally:
            started.kill()
            file.let_go()


def test_memory_is_locked_before_a_key_is_read(keyd: "subprocess.Popen[bytes]") -> None:
    """What was swapped out once is on the disk."""
    loose = [
        end - start
        for start, end, permissions, flags in _flagged_mappings(keyd.pid)
        if "w" in permissions and _NEVER_SWAPPED.isdisjoint(flags)
    ]
    assert not loose


@pytest.mark.parametrize("keyd", [as_the_supervisor_starts_it, as_a_service], indirect=True)
def test_speculation_is_off_before_a_key_is_read(keyd: "subprocess.Popen[bytes]") -> None:
    names = {
        prctl.SPEC_STORE_BYPASS: ("Speculation_Store_Bypass", "thread force mitigated"),
        prctl.SPEC_INDIRECT_BRANCH: ("SpeculationIndirectBranch", "conditional force disabled"),
    }
    found = status(keyd.pid)
    for feature in controllable_speculation():
        name, state = names[feature]
        assert found[name] == state
