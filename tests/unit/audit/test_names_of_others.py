"""What users name, as the kernel tells of it, is read whatever octets it has."""

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keyd.linux.mounts import Mount, mounts, uncovered
from titus_py.audit import memory
from titus_py.audit.mounts import in_sight
from titus_py.audit.observation import mappings_of

#: What Python takes for the end of a line or a blank, and what is no character.
NAME = b"a\r0-1 rw-p \x0b\x1c\xc2\x85 b\n\\\xff"

#: Mounts two file systems in a namespace of its own. Any user may have a program for one
#: (fusermount3(1)), and gives it a place, a name and a kind.
MOUNTS = """
import ctypes, json, os, sys
from keyd.linux.mounts import mounts
libc = ctypes.CDLL(None, use_errno=True)
def mount(source, place, kind, flags, options):
    os.mkdir(place)
    if libc.mount(source, os.fsencode(place), kind, flags, options):
        sys.exit(os.strerror(ctypes.get_errno()))
program, unnamed = sys.argv[1:]
options = f"fd={os.open('/dev/fuse', os.O_RDWR)},rootmode=40000,user_id=65534,group_id=0"
mount(b"a \\r", program, b"fuse.\\r\\xff", 0, options.encode())
mount(b"", unnamed, b"tmpfs", 1, None)  # MS_RDONLY
here = {one.path: one for one in mounts()}
found = [[one.kind, one.is_of_a_user, one.is_writable] for one in map(here.get, sys.argv[1:])]
json.dump(found, sys.stdout)
"""


def test_mounts(tmp_path: Path) -> None:
    if not Path("/dev/fuse").exists():
        pytest.skip("no FUSE here")
    places = [bytes(tmp_path) + b"/" + name for name in (NAME, b"unnamed")]
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", MOUNTS, *places],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["fuse.\r\udcff", True, True], ["tmpfs", False, False]]


def test_of_what_has_ended_there_are_none() -> None:
    """It may not be reaped yet."""
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ProcessLookupError):
            mounts(process.pid)


def test_a_mount_may_be_covered_by_an_older_one() -> None:
    """Of which mountinfo(5) tells first, as of Linux 6.8."""
    tmpfs = "0:1", "/", "/srv", "rw", "tmpfs", "rw"
    root = Mount(1, 0, "8:1", "/", "/", "rw", "ext4", "rw")
    older, newer = Mount(2, 3, *tmpfs), Mount(3, 1, *tmpfs)
    assert uncovered([root, older, newer]) == [root, older]


def test_what_is_said_of_a_mount_can_be_written() -> None:
    (device,) = {one.device for one in mounts() if one.path == "/proc"}
    mount = Mount(1, 1, device, "/", "/srv/\udcff\r", "rw", "fuse", "rw")
    assert in_sight(1, [mount]) == [
        "/srv/\\udcff\\r, which it shares with the machine, can be written to"
    ]


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[int]:
    """Where this process has a file of such a name."""
    path = bytes(tmp_path) + b"/" + NAME
    with open(path, "wb+") as file:
        file.truncate(mmap.PAGESIZE)
        with mmap.mmap(file.fileno(), mmap.PAGESIZE) as there:
            yield len(there)


def test_mapped_files(mapped: int) -> None:
    maps = Path("/proc/self/maps").read_bytes()
    (named,) = [one for one in mappings_of(maps) if "\x0b" in one.name]
    assert named.end - named.start == mapped
    assert len(list(mappings_of(maps))) == maps.count(b"\n")
    assert named.start in [start for start, *_ in memory._flagged_mappings(os.getpid())]
