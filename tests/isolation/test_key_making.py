"""The process that makes keys, taken over: it reads no key but the new one, and has no network.

Each attempt is made where nothing confines it, where it succeeds; by the real process; and by
processes of which parts of the confinement were left out, so that the others are seen to hold.
"""

import json
import os
import platform
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from keyd.linux import landlock
from titus_py.audit.throwaway_authority import ThrowawayAuthority
from titus_py.commands import key_maker
from titus_py.commands.key_maker import KeyMaker, NotMade
from titus_py.configuration import User

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="system calls by their numbers on x86-64"
)
ALL = ("filter", "root", "landlock", "user", "network", "limits")
KILLED = "has ended (-31)"  # SIGSYS
#: What it is that a confined process gets, with what of its confinement left out.
REFUSED = {
    ("read", ()): KILLED,
    ("read", ("filter",)): "ENOENT",
    ("read", ("filter", "root")): "EACCES",
    ("read", ("filter", "root", "landlock")): "EACCES",
    ("read", ("filter", "root", "user")): "EACCES",
    ("read_what_was_given", ()): "EBADF",
    ("make_socket", ()): KILLED,
    ("connect", ()): KILLED,
    ("connect", ("filter", "landlock")): "ENETUNREACH",
    ("connect", ("filter", "root", "landlock", "user", "limits")): "ENETUNREACH",
    ("kill", ()): KILLED,
    ("kill", ("filter",)): "EPERM",
    ("kill", ("filter", "landlock")): "EPERM",
    ("execute", ()): KILLED,
    ("execute", ("filter",)): "ENOENT",
    ("fork", ()): KILLED,
    ("fork", ("filter",)): "EAGAIN",
}


@pytest.fixture(scope="module")
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def attempt(directory: Path, deed: str, parameter: object, without: tuple[str, ...]) -> str:
    """What came of it."""
    script = Path(__file__).with_name("attacking_key_maker.py")
    order = json.dumps([without, deed, parameter])
    command = (sys.executable, "-I", str(script), order, "make")
    with mock.patch.object(key_maker, "_COMMAND", command):
        maker = KeyMaker(User("", 12_345, 12_345), directory / "empty", must_lock=False)
    issued = ThrowawayAuthority().issue("P-256", ["localhost"])
    new = os.open(directory / "new.key", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        maker.make(None, issued.certificate.decode(), new, False)
    except NotMade as error:
        return str(error)
    finally:
        os.close(new)
        maker.close()
    pytest.fail("it did as it was told")


def parameter_for(deed: str, directory: Path, listener: socket.socket) -> object:
    if deed == "read":
        key = directory / "old.key"
        key.touch(mode=0o600)
        return str(key)
    return {
        "make_socket": int(socket.AF_UNIX),
        "connect": listener.getsockname()[1],
        "kill": os.getpid(),
    }.get(deed)


@pytest.mark.parametrize("deed", ["read", "make_socket", "connect", "kill", "execute", "fork"])
def test_what_it_could_do_if_nothing_confined_it(
    deed: str, tmp_path: Path, listener: socket.socket
) -> None:
    said = attempt(tmp_path, deed, parameter_for(deed, tmp_path, listener), ALL)
    # What execve(2) starts gives no answer, and ends well.
    assert said in ("done", "the process that makes keys has ended (0): no message")


@pytest.mark.parametrize(("deed", "without"), REFUSED)
def test_what_it_cannot_do(
    deed: str, without: tuple[str, ...], tmp_path: Path, listener: socket.socket
) -> None:
    if "user" in without and "root" in without and not landlock.version():
        pytest.skip("no Landlock here")
    said = attempt(tmp_path, deed, parameter_for(deed, tmp_path, listener), without)
    assert REFUSED[deed, without] in said


def test_it_makes_nothing_where_it_cannot_be_confined(tmp_path: Path) -> None:
    """Such as in a root that is not empty."""
    (tmp_path / "file").touch()
    maker = KeyMaker(User("", 12_345, 12_345), tmp_path, must_lock=False)
    issued = ThrowawayAuthority().issue("P-256", ["localhost"])
    new = os.open(tmp_path / "new.key", os.O_WRONLY | os.O_CREAT, 0o600)
    with pytest.raises(NotMade, match="is not empty"):
        maker.make(None, issued.certificate.decode(), new, False)
    maker.close()
    assert os.fstat(new).st_size == 0
    os.close(new)
