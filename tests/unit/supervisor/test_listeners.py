"""Listening on unix sockets: those of systemd, those made here, and what is kept of them."""

import socket
import stat
from pathlib import Path

import pytest

from titus_py.configuration.address import UnixAddress
from titus_py.configuration.socket_access import SocketAccess
from titus_py.supervisor.listeners import (
    CannotListen,
    Listeners,
    Wishes,
    listen,
    passed_listeners,
)


@pytest.fixture
def address(tmp_path: Path) -> UnixAddress:
    return UnixAddress(f"{tmp_path}/x.sock")


def for_all(address: UnixAddress, access: SocketAccess = SocketAccess()) -> Wishes:  # noqa: B008
    return Wishes(access={address: access})


def test_a_changed_mode_is_applied_and_a_file_that_is_gone_is_told(address: UnixAddress) -> None:
    sockets, files = listen([address], for_all(address), {})
    listeners = Listeners({}, sockets, files)
    assert listeners.add([address], for_all(address)) == {}
    wishes = for_all(address, SocketAccess(0o666))
    assert list(listeners.settle([address], wishes)) == []
    path = Path(address.path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    path.unlink()
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(address.path)
        expected = f"{address}: its file is gone: restart titus-py"
        assert list(listeners.settle([address], wishes)) == [expected]
    listeners.close_all()
    assert path.is_socket(), "another's"


def test_nothing_is_left_if_one_of_several_cannot_be_had(
    address: UnixAddress, tmp_path: Path
) -> None:
    taken = UnixAddress(f"{tmp_path}/nowhere/y.sock")
    wishes = Wishes(access={address: SocketAccess(), taken: SocketAccess()})
    with pytest.raises(CannotListen, match=f"^cannot listen on {taken}: .* has to be there"):
        listen([address, taken], wishes, {})
    assert not Path(address.path).exists()


def test_of_systemds_sockets_those_with_a_path_are_used(address: UnixAddress) -> None:
    with (
        socket.socket(socket.AF_UNIX) as one,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as packets,
        socket.create_server(("127.0.0.1", 0)) as tcp,
    ):
        one.bind(address.path)
        abstract.bind(f"\0{address.path}")
        packets.bind(f"{address.path}.packets")
        passed = passed_listeners({"one": [one], "others": [abstract, packets, tcp]})
        port = tcp.getsockname()[1]
        assert list(map(str, passed)) == [str(address), f"127.0.0.1:{port}"]
        sockets, files = listen([address], for_all(address), passed)
        assert (sockets, files) == ({address: one}, {})
        with pytest.raises(CannotListen, match="set SocketMode="):
            listen([], for_all(address, SocketAccess(0o600)), passed)
        listeners = Listeners(passed, sockets, files)
        listeners.close_all()
    assert Path(address.path).is_socket()
