"""A keyd of its own whose log nobody reads: it signs, and says later what it has lost."""

import fcntl
import grp
import os
import re
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from keyd.protocol import Parting, Status
from keyd.serve import THREADS
from keyd.standard_error import QUEUE_LINES

from .service import PATIENCE
from .test_keyd_status import KEYD, Listening, make_key

#: The first of many that are nobody's.
_FIRST_USER = 1_900_000_000


def fill(write_end: int) -> None:
    """Write to a pipe until it is full."""
    # Of this process only: keyd has what it was given, with nothing that makes it not wait.
    again = os.open(f"/proc/self/fd/{write_end}", os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(again, b"\n")
    os.close(again)


@contextmanager
def as_user(user: int, group: str) -> Iterator[None]:
    """As a user of this group, which has nothing else of theirs."""
    os.setegid(grp.getgrnam(group).gr_gid)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


class Unread:
    """``keyd listen``, whose log is a pipe that is full."""

    def __init__(self, directory: Path) -> None:
        self.end, write_end = os.pipe()
        self._directory = os.open(directory, os.O_PATH)
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, select.PIPE_BUF)
        self.keyd = Listening(directory, log=write_end)
        # Not every user may enter what is above the directory.
        self.keyd.socket = Path(f"/proc/self/fd/{self._directory}", self.keyd.socket.name)
        # It listens before it says anything, and after that, it says something only if it refuses.
        assert select.select([self.end], [], [], PATIENCE)[0]
        assert self.keyd.ask() is Status.DONE
        fill(write_end)
        os.close(write_end)

    def refuse(self, user: int = 0) -> None:
        """What it refuses to one user has no more than a few lines a second."""
        with as_user(user, "www-data"):
            assert self.keyd.ask(b"no TLS") is not Status.DONE

    def read_until(self, words: bytes) -> bytes:
        read = b""
        while words not in read:
            assert select.select([self.end], [], [], PATIENCE)[0], read
            octets = os.read(self.end, 1 << 16)
            assert octets, read
            read += octets
        return read

    def close(self) -> None:
        self.keyd.close()
        os.close(self._directory)
        with suppress(OSError):
            os.close(self.end)


@pytest.fixture
def unread(tmp_path: Path) -> Iterator[Unread]:
    tmp_path.chmod(0o755)
    made = Unread(tmp_path)
    yield made
    made.close()


def test_keyd_signs_and_says_later_how_many_lines_were_lost(unread: Unread) -> None:
    asked = QUEUE_LINES + 20
    for user in range(asked):
        unread.refuse(_FIRST_USER + user)
    assert unread.keyd.ask() is Status.DONE
    read = unread.read_until(b" lines are lost: no room for them\n")
    (lost,) = re.findall(rb"\nkeyd: ([0-9]+) lines are lost", read)
    while read.count(b"keyd: refused, NOT_TLS: ") < asked - int(lost):
        read += unread.read_until(b"\n")
    # The only ones that are not told are those that were counted.
    assert 10 < int(lost) <= 20
    unread.refuse()
    read += unread.read_until(b"keyd: refused, NOT_TLS: ")
    assert read.count(b"lost") == 1


def test_keyd_outlives_who_reads_its_log(unread: Unread) -> None:
    os.close(unread.end)
    for _ in range(3):
        unread.refuse()
    assert unread.keyd.ask() is Status.DONE


def test_keyd_leaves_when_told_whoever_reads(unread: Unread) -> None:
    unread.refuse()
    unread.keyd.process.send_signal(signal.SIGTERM)
    assert unread.keyd.process.wait(PATIENCE) == 0


def test_a_keyd_for_a_proxy_goes_on_and_leaves_as_well(tmp_path: Path) -> None:
    end, write_end = os.pipe()
    path = tmp_path / "control.sock"
    make_key(tmp_path / "www.key")
    process = subprocess.Popen(
        [
            *(KEYD, "control", f"--socket={path}", f"--key={tmp_path / 'www.key'}"),
            *("--user=daemon", f"--chroot={tmp_path / 'root'}"),
        ],
        stderr=write_end,
    )

    def keys(then: bytes = b"") -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as parent:
            parent.settimeout(PATIENCE)
            parent.connect(str(path))
            told = parent.recv(1000)
            if then:
                parent.send(then)
                # keyd closes it, once it has said why in its log.
                assert parent.recv(1000) == Parting().encode()
                assert not parent.recv(1000)
            return told

    try:
        # It listens before it says anything.
        assert select.select([end], [], [], PATIENCE)[0]
        told = keys()
        fill(write_end)
        # More often than keyd has threads.
        for _ in range(2 * THREADS):
            assert keys(b"what no parent says") == told
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        os.close(end)
        os.close(write_end)
