"""The files of unix sockets: what is replaced, what is not, and whose they are."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from titus_py.configuration.address import UnixAddress
from titus_py.configuration.socket_access import SocketAccess
from titus_py.supervisor.socket_files import is_there, listen_at, remove, update

ROOTS = SocketAccess()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.sock"


def access(path: Path) -> tuple[int, int, int]:
    seen = path.lstat()
    return stat.S_IMODE(seen.st_mode), seen.st_uid, seen.st_gid


def test_it_is_made_with_its_owner_and_mode_and_can_be_given_to_others(path: Path) -> None:
    path.parent.chmod(0o2755)  # which would make a file its group's
    os.chown(path.parent, -1, 7)
    listener, file = listen_at(UnixAddress(str(path)), ROOTS, 1)
    with listener:
        assert access(path) == (0o660, 0, 0)
        for one in (SocketAccess(0o666, 12, 34), SocketAccess(0o600, 56, None), ROOTS):
            update(UnixAddress(str(path)), file, one)
            assert access(path) == (one.mode, *one.owner)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert is_there(UnixAddress(str(path)), file)
    remove(UnixAddress(str(path)), file)
    assert not path.exists()
    assert not is_there(UnixAddress(str(path)), file)
    remove(UnixAddress(str(path)), file)


def test_one_that_a_crash_left_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as before:
        before.bind(str(path))
    listener, file = listen_at(UnixAddress(str(path)), ROOTS, 1)
    with listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    # What has taken its place is another's.
    path.unlink()
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(str(path))
    path.chmod(0o600)
    with pytest.raises(FileExistsError):
        update(UnixAddress(str(path)), file, SocketAccess(0o666))
    remove(UnixAddress(str(path)), file)
    assert access(path)[0] == 0o600


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_one_that_somebody_serves_is_not(path: Path, kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            other.listen(0)
        made = path.lstat().st_ino
        with pytest.raises(FileExistsError, match="another process serves this socket"):
            listen_at(UnixAddress(str(path)), ROOTS, 1)
        assert path.lstat().st_ino == made


def test_nor_is_one_whose_queue_is_full(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as waiting:
        other.bind(str(path))
        other.listen(0)
        waiting.connect(str(path))
        with pytest.raises(FileExistsError, match="another process serves this socket"):
            listen_at(UnixAddress(str(path)), ROOTS, 1)


def test_a_link_is_not_followed_wherever_it_leads(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    path.symlink_to(target)
    with pytest.raises(FileExistsError, match="symbolic link"):
        listen_at(UnixAddress(str(path)), ROOTS, 1)
    assert not target.exists()
    with socket.socket(socket.AF_UNIX) as before:
        before.bind(str(target))
    with pytest.raises(FileExistsError, match="symbolic link"):
        listen_at(UnixAddress(str(path)), ROOTS, 1)
    assert target.is_socket()


def test_no_other_file_is_replaced(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="no socket is there, and is not replaced"):
        listen_at(UnixAddress(str(path)), ROOTS, 1)
    assert path.read_text() == "precious"
    path.unlink()
    path.mkdir()
    with pytest.raises(FileExistsError, match="no socket"):
        listen_at(UnixAddress(str(path)), ROOTS, 1)


def test_a_directory_that_is_not_there(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        listen_at(UnixAddress(f"{path}/x"), ROOTS, 1)


#: As the unit has titus-py: root, without CAP_CHOWN.
_WITHOUT_CHOWN = """
import sys
import prctl
from keyd.linux.credentials import give_up_capabilities, permitted_capabilities
from titus_py.configuration.address import UnixAddress
from titus_py.configuration.socket_access import SocketAccess
from titus_py.supervisor.socket_files import listen_at, update

give_up_capabilities(permitted_capabilities() - {prctl.CAP_CHOWN, prctl.CAP_FOWNER})
address = UnixAddress(sys.argv[1])
_, file = listen_at(address, SocketAccess(0o660, None, 7), 1)
update(address, file, SocketAccess(0o620, None, 8))
try:
    update(address, file, SocketAccess(0o620, 9, 8))
except PermissionError:
    print("refused")
"""


def test_a_group_takes_no_capability_beyond_what_the_unit_has(path: Path) -> None:
    command = [sys.executable, "-I", "-c", _WITHOUT_CHOWN, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("refused\n", "")
    assert access(path) == (0o620, 0, 8)
