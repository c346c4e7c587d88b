"""What keyd's memory is kept from before a key is in it: the disk, and its core's neighbours."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import prctl
import pytest
from integration.instance import TITUS_PY, eventually

from keyd.linux.credentials import controllable_speculation
from keyd.linux.sealed import sealed_file
from titus_py.audit.instance import status
from titus_py.audit.memory import _NEVER_SWAPPED, _flagged_mappings

from .held_file import held

Keyd = Sequence[str | Path]
KEYD: Keyd = [TITUS_PY.with_name("keyd")]
#: The control.
UNPROTECTED: Keyd = [
    sys.executable,
    "-I",
    "-c",
    "import sys; from keyd import __main__ as keyd, key_reader, of_its_own, serve\n"
    "for one in keyd, key_reader, of_its_own, serve:\n"
    "    one.lock_memory_meanwhile = one.lock_before_keys = lambda *_: None\n"
    "    one.guard = list\n"
    "sys.exit(keyd.main())",
]


def as_the_supervisor_starts_it(keyd: Keyd, key: Path) -> "subprocess.Popen[bytes]":
    terms = {"uid": 1, "gid": 1, "chroot": "/", "must_lock": True, "filter": "", "tokens": []}
    terms |= {"lending": None, "upstreams": []}
    keys = [{"key": str(key), "passphrase_file": None}]
    settings = sealed_file("settings", json.dumps({**terms, "keys": keys}).encode())
    other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)[0]
    parent, supervisor = other.fileno(), os.dup(other.fileno())
    command = [*keyd, "serve", f"--settings-fd={settings}", f"--parent-fd={parent}"]
    descriptors = settings, parent, supervisor
    started = subprocess.Popen(
        [*command, f"--supervisor-fd={supervisor}"], pass_fds=descriptors, stderr=subprocess.DEVNULL
    )
    other.close()
    os.close(settings)
    os.close(supervisor)
    return started


def as_a_service(keyd: Keyd, key: Path) -> "subprocess.Popen[bytes]":
    command = [*keyd, "control", f"--socket={key.parent}/socket", "--user=uucp"]
    return subprocess.Popen(
        [*command, f"--chroot={key.parent}/root", f"--key={key}"], stderr=subprocess.DEVNULL
    )


def as_a_check(keyd: Keyd, key: Path) -> "subprocess.Popen[bytes]":
    started = subprocess.Popen(
        [*keyd, "check"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert started.stdin is not None
    files = {"certificate": str(key.with_name("certificate")), "key": str(key)}
    started.stdin.write(json.dumps([files]).encode())
    started.stdin.close()
    return started


Start = Callable[[Keyd, Path], "subprocess.Popen[bytes]"]
SERVING: list[Start] = [as_the_supervisor_starts_it, as_a_service]


@contextmanager
def about_to_read_a_key(start: Start, keyd: Keyd, directory: Path) -> Iterator[int]:
    """A keyd that is about to open its key file, and is held there; yields its pid.

    As a service, that is a process that it has forked.
    """
    key = directory / "key"
    key.touch(mode=0o600)
    with held(key) as file, start(keyd, key) as started:
        try:
            opener = eventually(file.opener, "keyd opens the key")
            assert (opener == started.pid) == (start is not as_a_service)
            yield opener
        finally:
            started.kill()
            file.let_go()


def may_be_swapped_out(pid: int) -> int:
    """So many octets of what it can write to."""
    return sum(
        end - start
        for start, end, permissions, flags in _flagged_mappings(pid)
        if "w" in permissions and _NEVER_SWAPPED.isdisjoint(flags)
    )


@pytest.mark.parametrize("start", [*SERVING, as_a_check])
def test_memory_is_locked_before_a_key_is_read(start: Start, tmp_path: Path) -> None:
    """What was swapped out once is on the disk."""
    with about_to_read_a_key(start, KEYD, tmp_path) as pid:
        assert may_be_swapped_out(pid) == 0


@pytest.mark.parametrize("start", [*SERVING, as_a_check])
def test_it_would_not_be_by_itself(start: Start, tmp_path: Path) -> None:
    """The control: at the same point, memory that the key's octets are about to get into."""
    with about_to_read_a_key(start, UNPROTECTED, tmp_path) as pid:
        assert may_be_swapped_out(pid) > 1 << 20


@pytest.mark.parametrize("start", SERVING)
@pytest.mark.parametrize("keyd", [KEYD, UNPROTECTED], ids=["as it is", "control"])
def test_speculation_is_off_before_a_key_is_read(start: Start, keyd: Keyd, tmp_path: Path) -> None:
    names = {
        prctl.SPEC_STORE_BYPASS: ("Speculation_Store_Bypass", "thread force mitigated"),
        prctl.SPEC_INDIRECT_BRANCH: ("SpeculationIndirectBranch", "conditional force disabled"),
    }
    with about_to_read_a_key(start, keyd, tmp_path) as pid:
        found = status(pid)
        for feature in controllable_speculation():
            name, state = names[feature]
            assert (found[name] == state) == (keyd is KEYD)
