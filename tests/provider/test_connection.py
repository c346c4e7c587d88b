"""The connection that the provider keeps: one for many requests, and never somebody else's.

keyd's side of it is played step by step. All of it under AddressSanitizer and
UndefinedBehaviorSanitizer.
"""

import hashlib
import os
import select
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from keyd.protocol import MAX_REQUEST_OCTETS, Reply, Request, Status

from .support import PATIENCE, Harness, Site, StartHarness

O_CLOEXEC = 0o2000000
NOBODY = 65534
SIGNATURE = bytes(256)
SIGNED = f"ok {SIGNATURE.hex()}"


class Door:
    """keyd's socket, and what comes there; the harness is asked meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._listener.settimeout(PATIENCE)
        self._pool = ThreadPoolExecutor(1)
        self.harness: Harness

    def ask(self, harness: Harness, site: Site) -> None:
        self.harness = harness
        harness.load(site.reference.read_bytes())

    def begin(self) -> None:
        """Have it sign, and go on."""
        self._outcome = self._pool.submit(self.harness.sign, "SHA256")

    def outcome(self) -> str:
        return self._outcome.result(PATIENCE)

    def accept(self) -> socket.socket:
        made, _ = self._listener.accept()
        made.settimeout(PATIENCE)
        self._made.append(made)
        return made

    def accept_until_stopped(self) -> Iterator[socket.socket]:
        # A listening unix socket with a timeout is waited for with poll(2), which stop() ends not.
        self._listener.settimeout(None)
        with suppress(OSError):
            while True:
                yield self.accept()

    def signs_by(self, connection: socket.socket) -> bool:
        """Whether the next request comes by this connection, and gets its answer."""
        self.begin()
        answer(connection)
        return self.outcome() == SIGNED

    def signs_by_a_new_one(self) -> socket.socket:
        self.begin()
        made = self.accept()
        answer(made)
        assert self.outcome() == SIGNED
        return made

    def stop(self) -> None:
        """Nobody can connect any more."""
        self._listener.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        for connection in self._made:
            connection.close()
        self._pool.shutdown()


def answer(connection: socket.socket, status: Status = Status.DONE) -> None:
    Request.decode(connection.recv(MAX_REQUEST_OCTETS))
    connection.send(Reply(status, SIGNATURE if status is Status.DONE else b"").encode())


def is_left(connection: socket.socket) -> bool:
    return connection.recv(1) == b""


def peer(connection: socket.socket) -> tuple[int, int]:
    """Its process and its user, as of when it connected."""
    seen = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return struct.unpack("iii", seen)[:2]


def sockets_of(process: int) -> dict[str, str]:
    """Its descriptors that are sockets, and which."""
    directory = Path(f"/proc/{process}/fd")
    links = {entry.name: os.readlink(entry) for entry in directory.iterdir()}
    return {name: link for name, link in links.items() if link.startswith("socket:")}


@pytest.fixture
def door() -> Iterator[Door]:
    # In a directory that every user may enter.
    directory = Path(tempfile.mkdtemp(prefix="titus-py-door-"))
    directory.chmod(0o755)
    made = Door(directory / "keyd.sock")
    yield made
    made.close()
    shutil.rmtree(directory)


@pytest.fixture
def harness(door: Door, start_harness: StartHarness, sites: dict[str, Site]) -> Iterator[Harness]:
    with start_harness(f"socket = {door.path}") as running:
        door.ask(running, sites["rsa"])
        yield running


def test_one_connection_carries_many_requests(door: Door, harness: Harness) -> None:
    connection = door.signs_by_a_new_one()
    for _ in range(3):
        assert door.signs_by(connection)
    [descriptor] = sockets_of(harness.process.pid)
    # No program that it starts has it.
    information = Path(f"/proc/{harness.process.pid}/fdinfo/{descriptor}").read_text()
    [flags] = [line.split()[1] for line in information.splitlines() if line.startswith("flags")]
    assert int(flags, 8) & O_CLOEXEC


# --- keyd leaves it ----------------------------------------------------------------------


def test_a_connection_that_keyd_has_left_is_made_anew(door: Door, harness: Harness) -> None:
    door.signs_by_a_new_one().close()
    assert door.signs_by(door.signs_by_a_new_one())


def test_a_connection_that_keyd_reads_no_more_is_made_anew(door: Door, harness: Harness) -> None:
    first = door.signs_by_a_new_one()
    first.shutdown(socket.SHUT_RD)
    door.signs_by_a_new_one()
    assert is_left(first)


def test_a_new_connection_that_keyd_does_not_read_is_made_anew(
    door: Door, harness: Harness
) -> None:
    """As of a client that had asked nothing yet when keyd was told to leave."""
    door.begin()
    unread = door.accept()
    # The request may be there already, or cannot be sent any more.
    unread.shutdown(socket.SHUT_RD)
    unread.close()
    answer(door.accept())
    assert door.outcome() == SIGNED


@pytest.mark.parametrize("read", [True, False], ids=["end of file", "reset"])
def test_what_keyd_has_not_answered_is_asked_again(
    door: Door, harness: Harness, read: bool
) -> None:
    connection = door.signs_by_a_new_one()
    door.begin()
    readable = select.poll()
    readable.register(connection, select.POLLIN)
    assert readable.poll(PATIENCE * 1000)
    if read:
        connection.recv(MAX_REQUEST_OCTETS)
    connection.close()
    again = door.accept()
    answer(again)
    assert door.outcome() == SIGNED
    assert door.signs_by(again)


def test_it_is_asked_again_only_once(door: Door, harness: Harness) -> None:
    """Of those that have read it: one that has ended a connection before has not been asked."""
    door.signs_by_a_new_one().close()
    door.begin()
    for _ in range(2):
        again = door.accept()
        again.recv(MAX_REQUEST_OCTETS)
        again.close()
    assert "[keyd|keyd is gone|keyd: gone: it closed the channel]" in door.outcome()
    door.signs_by_a_new_one()


def test_who_has_read_it_was_asked_by_a_kept_connection_too(door: Door, harness: Harness) -> None:
    connection = door.signs_by_a_new_one()
    door.begin()
    connection.recv(MAX_REQUEST_OCTETS)
    connection.close()
    again = door.accept()
    again.recv(MAX_REQUEST_OCTETS)
    again.close()
    assert "[keyd|keyd is gone|keyd: gone: it closed the channel]" in door.outcome()


def test_a_refusal_is_final(door: Door, harness: Harness) -> None:
    connection = door.signs_by_a_new_one()
    door.begin()
    answer(connection, Status.NOT_TLS)
    assert "[keyd|refused: not TLS|" in door.outcome()
    assert is_left(connection)
    door.signs_by_a_new_one()


def test_a_late_answer_is_not_the_next_ones(
    door: Door, start_harness: StartHarness, sites: dict[str, Site]
) -> None:
    with start_harness(f"socket = {door.path}", "timeout_ms = 1000") as running:
        door.ask(running, sites["rsa"])
        connection = door.signs_by_a_new_one()
        door.begin()
        connection.recv(MAX_REQUEST_OCTETS)
        assert "[keyd|no answer in time|keyd: no answer in 1000 ms]" in door.outcome()
        assert is_left(connection)


# --- it is somebody else's -----------------------------------------------------------------


def test_a_descriptor_that_is_another_file_by_now_is_left_alone(
    door: Door, harness: Harness
) -> None:
    first = door.signs_by_a_new_one()
    [descriptor] = sockets_of(harness.process.pid)
    assert harness.ask(f"replace {descriptor}") == "ok"
    assert is_left(first)
    others = sockets_of(harness.process.pid)[descriptor]
    second = door.signs_by_a_new_one()
    assert sockets_of(harness.process.pid)[descriptor] == others
    assert door.signs_by(second)


def test_a_child_has_a_connection_of_its_own(door: Door, harness: Harness) -> None:
    parents = door.signs_by_a_new_one()
    child = int(harness.ask("fork").removeprefix("ok "))
    childs = door.signs_by_a_new_one()
    assert door.signs_by(childs)
    assert [peer(parents)[0], peer(childs)[0]] == [harness.process.pid, child]
    # It has given back its copy of its parent's.
    assert len(sockets_of(child)) == 1
    assert harness.ask("end") == "ok"
    assert is_left(childs)
    assert door.signs_by(parents)


def test_another_user_has_to_be_let_in_again(door: Door, harness: Harness) -> None:
    door.path.chmod(0o600)
    first = door.signs_by_a_new_one()
    assert harness.ask(f"become {NOBODY}") == "ok"
    assert "[keyd|keyd cannot be reached: permission denied|" in harness.sign("SHA256")
    assert is_left(first)
    door.path.chmod(0o666)
    second = door.signs_by_a_new_one()
    assert peer(second) == (harness.process.pid, NOBODY)
    assert harness.ask("become 0") == "ok"


def test_a_standard_stream_is_not_kept(
    door: Door, start_harness: StartHarness, sites: dict[str, Site]
) -> None:
    """What a program writes to its standard error would go to keyd."""
    without = ("sh", "-c", 'exec "$@" 2>&-', "sh")
    with start_harness(f"socket = {door.path}", run_by=without) as running:
        door.ask(running, sites["rsa"])
        assert is_left(door.signs_by_a_new_one())
        assert is_left(door.signs_by_a_new_one())


def test_threads_get_each_their_own_answers(door: Door, harness: Harness) -> None:
    count, times = 4, 200
    serving: list[threading.Thread] = []

    def serve(connection: socket.socket) -> None:
        while message := connection.recv(MAX_REQUEST_OCTETS):
            digest = hashlib.sha256(Request.decode(message).payload).digest()
            connection.send(Reply(Status.DONE, digest * 8).encode())

    def accept() -> None:
        for made in door.accept_until_stopped():
            serving.append(threading.Thread(target=serve, args=[made]))
            serving[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    assert harness.ask(f"threads {count} {times}") == f"ok {count * times}"
    assert len(serving) < count * times
    assert len(sockets_of(harness.process.pid)) == 1
    door.stop()
    accepting.join()
    assert harness.process.stdin is not None
    harness.process.stdin.close()
    for thread in serving:
        thread.join()
