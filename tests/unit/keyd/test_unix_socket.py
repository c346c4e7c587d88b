"""The files of unix sockets in a directory that another user can write to."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

#: Makes the socket, as the supervisor or keyd does; with "hostile", another user is always quicker:
#: before each change of owner or mode, a link to their victim takes the socket's place.
DRIVER = """
import argparse, os, sys

who, path, victim, hostile = sys.argv[1:]

def swap(event, arguments):
    if event in ("os.chmod", "os.chown") and not os.path.islink(path):
        os.rename(path, path + ".before")
        os.symlink(victim, path)

if hostile == "hostile":
    sys.addaudithook(swap)
if who == "metrics":
    from titus_py.configuration.address import UnixAddress
    from titus_py.supervisor.metrics_address import listen_at
    listen_at(UnixAddress(path))
elif who == "tunnel":
    from titus_py.configuration.address import UnixAddress
    from titus_py.configuration.socket_access import SocketAccess
    from titus_py.supervisor.socket_files import is_there, listen_at, remove
    listener, file = listen_at(UnixAddress(path), SocketAccess(0o620, 3, 4), 1)
    if hostile == "hostile":
        assert not is_there(UnixAddress(path), file)
        remove(UnixAddress(path), file)
        assert os.path.islink(path)
else:
    from contextlib import ExitStack
    from keyd.listeners import listeners
    owner, mode = ((0, 0), 0o600) if who == "control" else ((1, 2), 0o660)
    listeners(argparse.Namespace(socket=path), ExitStack(), lambda: owner, mode)
"""


def make(who: str, directory: Path, manner: str) -> Path:
    path, victim = directory / "socket", directory / "victim"
    victim.touch(mode=0o604)
    command = [sys.executable, "-c", DRIVER, who, path, victim, manner]
    subprocess.run(command, check=True, umask=0o022)
    return path


def owner_and_mode(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


@pytest.mark.parametrize(
    ("who", "expected"),
    [
        ("metrics", (0, 0, 0o660)),
        ("control", (0, 0, 0o600)),
        ("listen", (1, 2, 0o660)),
        ("tunnel", (3, 4, 0o620)),
    ],
)
def test_a_socket_has_its_owner_and_mode_and_no_other_file_gets_them(
    tmp_path: Path, who: str, expected: tuple[int, int, int]
) -> None:
    made = make(who, tmp_path, "alone")
    assert stat.S_ISSOCK(made.lstat().st_mode)
    assert owner_and_mode(made) == expected
    made.unlink()
    make(who, tmp_path, "hostile")
    assert owner_and_mode(tmp_path / "victim") == (0, 0, 0o604)
