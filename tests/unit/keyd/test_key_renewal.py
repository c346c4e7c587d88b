"""A reading of the key files that ends half-way: what it has found is not taken for the whole."""

import errno
import mmap
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from keyd import key_reader
from keyd.key_files import KeySources
from keyd.key_reader import ORDER
from keyd.key_renewal import Renewal
from keyd.keys import UnusableKey
from keyd.powers import PrivateKey

#: Shared with the process that reads.
BEGUN = mmap.mmap(-1, 1)
STAYS, GOES = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))


class Interrupted(KeySources):
    """Its process is killed after the first key of the first reading; then that file is gone."""

    def load(self) -> Iterator[tuple[str, PrivateKey | UnusableKey]]:
        if not BEGUN[0]:
            BEGUN[0] = 1
            yield "goes", GOES
            os.kill(os.getpid(), signal.SIGKILL)
        yield "stays", STAYS


@pytest.fixture
def reader() -> Iterator[socket.socket]:
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    before = set(children.read_text().split())
    with key_reader.start(Interrupted((), None, None), must_lock=False) as ours:
        ours.settimeout(30)
        (child,) = set(children.read_text().split()) - before
        yield ours
    os.waitpid(int(child), 0)


class Scarce(socket.socket):
    """One that cannot receive, for once: no test has the kernel run out of memory."""

    error = 0

    def recv_into(self, *arguments: Any) -> int:
        error, self.error = self.error, 0
        if error:
            raise OSError(error, os.strerror(error))
        return super().recv_into(*arguments)


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.ENOBUFS])
def test_a_machine_that_is_short_of_memory_ends_no_reader(error: int) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with other, Scarce(fileno=one.detach()) as reader:
        renewal = Renewal(reader, lambda _: None, lambda _: None)
        reader.error = error
        other.send(b"F" + b"said")
        assert not renewal._hear(reader, lambda: None)
        assert not renewal._hear(reader, lambda: None)
        other.close()
        assert renewal._hear(reader, lambda: None)


def test_a_reading_that_was_killed_is_named_and_forgotten(
    reader: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[PrivateKey] = []
    renewal = Renewal(reader, taken.append, lambda _: None)
    for messages in (2, 2):
        reader.send(ORDER)
        for _ in range(messages):
            # A message that is awaited.
            reader.recv(1, socket.MSG_PEEK)
            assert not renewal._hear(reader, lambda: None)
    assert [key.public_key() for key in taken] == [STAYS.public_key()]
    said = "keys cannot be read again: the process for that killed by SIGKILL"
    assert said in capsys.readouterr().err
