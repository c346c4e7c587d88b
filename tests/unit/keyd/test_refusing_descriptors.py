"""Sockets on which keyd expects no descriptors, and what one that it does not want can do to it."""

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from integration.peers import end_the_wait, lingering
from integration.tokens import scratch

from keyd import helper, key_reader
from keyd.key_files import KeySources
from keyd.linux import seccomp
from keyd.linux.unix_socket import SO_PASSRIGHTS, refuse_descriptors
from keyd.system_calls import CONNECTING
from keyd.upstream.connector import CONNECTED, MAX_MESSAGE_OCTETS
from titus_py.configuration.address import UnixAddress
from titus_py.configuration.socket_access import SocketAccess
from titus_py.supervisor.socket_files import listen_at

Pair = tuple[socket.socket, socket.socket]


def _kernel_can() -> bool:
    with socket.socket(socket.AF_UNIX) as one:
        try:
            one.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS)
        except OSError:
            return False
        return True


refused_by_kernel = pytest.mark.skipif(not _kernel_can(), reason="takes Linux 6.16")


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def is_refused(sender: socket.socket) -> bool:
    """Whether a descriptor cannot be sent that makes its last holder wait."""
    side, peer = lingering()
    try:
        socket.send_fds(sender, [b"x"], [side.fileno()])
    except PermissionError:
        return True
    finally:
        end_the_wait(peer)
        side.close()
    return False


def test_unwanted_it_makes_its_reader_wait(pair: Pair) -> None:
    """Although the reader asks for no descriptors, and wants to wait for nothing."""
    ours, theirs = pair
    side, peer = lingering()
    socket.send_fds(theirs, [b"x"], [side.fileno()])
    side.close()
    received = threading.Event()

    def receive() -> None:
        ours.recv(1, socket.MSG_DONTWAIT)
        received.set()

    thread = threading.Thread(target=receive)
    thread.start()
    assert not received.wait(0.5)
    end_the_wait(peer)
    assert received.wait(10)
    thread.join()


@refused_by_kernel
def test_it_is_refused_and_all_else_arrives(pair: Pair) -> None:
    ours, theirs = pair
    refuse_descriptors(ours)
    assert is_refused(theirs)
    theirs.send(b"octets")
    assert ours.recv(10) == b"octets"


@refused_by_kernel
def test_by_a_listener_of_the_supervisors(tmp_path: Path) -> None:
    """Of clients, a tunnel's too, and of those that borrow keys: also before one is accepted."""
    path = str(tmp_path / "x.sock")
    listener, _ = listen_at(UnixAddress(path), SocketAccess(), 1)
    with listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        assert is_refused(client)
        with listener.accept()[0]:
            assert is_refused(client)


@refused_by_kernel
@pytest.mark.parametrize(
    "start",
    [
        lambda directory: helper.start("token", {}),
        lambda directory: key_reader.start(KeySources((), str(directory), None), must_lock=False),
    ],
    ids=["a token's process", "the process that reads keys again"],
)
def test_from_a_process_of_keyds(start: Callable[[Path], socket.socket], tmp_path: Path) -> None:
    with start(tmp_path) as process:
        assert not process.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS)


@refused_by_kernel
def test_from_whoever_accepts_where_an_upstream_is() -> None:
    """The process that connects is confined. It gives keyd descriptors, and the other end none."""
    with scratch() as directory, socket.socket(socket.AF_UNIX) as listener:
        path = directory / "x.sock"
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen()
        told = {
            "paths": [str(path)],
            "user": (65534, 65534, []),
            "filter": seccomp.build(CONNECTING).hex(),
        }
        with helper.start("connect", told, gives=True) as connector:
            with listener.accept()[0] as lender:
                connector.settimeout(60)
                message, descriptors, _, _ = socket.recv_fds(connector, MAX_MESSAGE_OCTETS, 2)
                assert message[:1] == CONNECTED
                assert len(descriptors) == 2
                assert is_refused(lender)
                with socket.socket(fileno=descriptors[0]) as keyds:
                    lender.send(b"octets")
                    assert keyds.recv(10) == b"octets"
                socket.close(descriptors[1])
