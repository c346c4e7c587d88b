"""A reading of the key files that ends half-way: what it has found is not taken for the whole."""

import errno
import itertools
import mmap
import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from keyd import key_reader
from keyd.daemon import Keyd
from keyd.key_files import KeySources
from keyd.key_reader import ORDER
from keyd.key_renewal import Renewal
from keyd.keys import UnusableKey
from keyd.powers import PrivateKey

#: Shared with the process that reads.
BEGUN = mmap.mmap(-1, 1)
PATIENCE = 30
STAYS, GOES = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))


class Interrupted(KeySources):
    """Its process is killed after the first key of the first reading; then that file is gone."""

    def load(self) -> Iterator[tuple[str, PrivateKey | UnusableKey]]:
        if not BEGUN[0]:
            BEGUN[0] = 1
            yield "goes", GOES
            os.kill(os.getpid(), signal.SIGKILL)
        yield "stays", STAYS


@contextmanager
def reading(sources: KeySources) -> Iterator[socket.socket]:
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    before = set(children.read_text().split())
    with key_reader.start(sources, must_lock=False) as ours:
        (child,) = set(children.read_text().split()) - before
        yield ours
    os.waitpid(int(child), 0)


@pytest.fixture
def reader() -> Iterator[socket.socket]:
    BEGUN[0] = 0
    with reading(Interrupted((), None, None)) as ours:
        ours.settimeout(PATIENCE)
        yield ours


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


def test_a_reader_that_has_ended_before_it_is_asked_has_said_why() -> None:
    ours, readers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    readers.send(b"F" + b"it cannot be confined")
    readers.close()
    with ours, pytest.raises(LookupError, match="it cannot be confined"):
        Renewal(ours, lambda _: None, lambda _: None).begin(KeySources((), None, None), False)


def test_without_a_reader_each_hangup_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = signal.getsignal(signal.SIGHUP)
    keyd = Keyd({})
    try:
        Renewal(ours, lambda _: None, lambda _: None).on_hangup(keyd, lambda: None)
        theirs.close()
        keyd._take_turn(0)
        said = "keyd: keys cannot be read again: the process for that has ended\n"
        assert capsys.readouterr().err == said
        for _ in range(2):
            signal.raise_signal(signal.SIGHUP)
            assert capsys.readouterr().err == said
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_bad_file_may_have_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / os.fsdecode(b"not UTF-8: \xff")).write_text("no key")
    sources = KeySources((), str(tmp_path), None)
    with reading(sources) as ours:
        Renewal(ours, lambda _: None, lambda _: None).begin(sources, needed=False)
    assert "not UTF-8" in capsys.readouterr().err


class Endless(KeySources):
    """A file takes for ever, as one of another host may."""

    def load(self) -> Iterator[tuple[str, PrivateKey | UnusableKey]]:
        BEGUN[0] = 2
        while True:
            signal.pause()
        yield


def test_a_reading_that_no_process_can_be_made_for_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    BEGUN[0] = 1
    fork, calls = os.fork, itertools.count(1)

    def scarce() -> int:
        # The first is the reader itself.
        if next(calls) == 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    monkeypatch.setattr(os, "fork", scarce)
    with reading(Interrupted((), None, None)) as ours:
        ours.settimeout(PATIENCE)
        ours.send(ORDER)
        why = b"no process can be made for that: Resource temporarily unavailable"
        assert ours.recv(1000) == b"F" + why
        ours.send(ORDER)
        assert ours.recv(10_000)[:1] == b"K"
        assert ours.recv(1000) == b"E"


@pytest.mark.parametrize("uid", {os.geteuid(), os.geteuid() or 65534})
def test_a_reader_whose_reading_does_not_end_ends_with_keyd(uid: int) -> None:
    """systemd would wait for it for a minute and a half. keyd may have another uid by then."""
    BEGUN[0] = 0
    ours, theirs = socket.socketpair()
    keyd = os.fork()
    if keyd == 0:
        try:
            reader = key_reader.start(Endless((), None, None), must_lock=False)
            children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
            theirs.send(children.read_bytes())
            reader.send(ORDER)
            os.setresuid(uid, uid, uid)
            signal.pause()
        finally:
            os._exit(1)
    with ours, theirs:
        ours.settimeout(PATIENCE)
        reader_pid = int(ours.recv(100))
    while BEGUN[0] != 2:
        os.sched_yield()
    pidfd = os.pidfd_open(reader_pid)
    os.kill(keyd, signal.SIGKILL)
    os.waitpid(keyd, 0)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    try:
        assert poll.poll(1000 * PATIENCE)
    finally:
        os.close(pidfd)
        with suppress(ProcessLookupError):
            os.kill(reader_pid, signal.SIGKILL)
