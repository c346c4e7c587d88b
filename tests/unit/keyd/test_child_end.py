"""The end of a child: also where no descriptor tells it (pidfd_open(2)), or somebody traces it."""

import errno
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pyseccomp
import pytest
from integration.instance import eventually
from integration.tracing import stop_as_traced, traced

from keyd.key_files import KeySources
from keyd.key_reader import ORDER
from keyd.key_reader import start as start_reader
from keyd.keys import UnusableKey
from keyd.linux.child_end import ChildEnd
from keyd.powers import PrivateKey
from keyd.token import minder

PATIENCE = 30
_Done = TypeVar("_Done")


def without_pidfds(do: Callable[[], _Done]) -> _Done:
    """Do this in a thread that gets none, nor does a process that it makes."""

    def confined() -> _Done:
        program = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
        program.add_rule(pyseccomp.ERRNO(errno.ENFILE), "pidfd_open")
        program.load()
        with pytest.raises(OSError, match="Too many open files in system"):
            os.pidfd_open(os.getpid())
        return do()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(confined).result()


def child_that(does: Callable[[], object]) -> int:
    """It ends with code 7."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(2 * PATIENCE)
            does()
        finally:
            os._exit(7)
    return child


def children() -> set[int]:
    """This process's, by whichever of its threads."""
    found = Path("/proc/self/task").glob("*/children")
    return {int(pid) for one in found for pid in one.read_text().split()}


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_it_ends(pair: tuple[socket.socket, socket.socket]) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    end = ChildEnd(child_that(lambda: None), pair[0])
    # That the other one says something is no end.
    pair[1].send(b"something")
    assert end.code(PATIENCE) == 7
    assert not end.other_has_ended
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_the_other_one_ends(pair: tuple[socket.socket, socket.socket]) -> None:
    child = child_that(signal.pause)
    end = ChildEnd(child, pair[0])
    assert end.code(0) is None
    assert not end.other_has_ended
    pair[1].shutdown(socket.SHUT_RDWR)
    assert end.code(PATIENCE) is None
    assert end.other_has_ended
    os.kill(child, signal.SIGKILL)
    assert end.code(PATIENCE) == -signal.SIGKILL


def test_it_ends_where_nothing_tells(pair: tuple[socket.socket, socket.socket]) -> None:
    end = ChildEnd(child_that(lambda: None), pair[0])
    code = None
    while code is None:
        code = without_pidfds(lambda: end.code(0.01))
    assert code == 7


def test_the_other_one_ends_where_nothing_tells(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    child = child_that(signal.pause)
    end = ChildEnd(child, pair[0])
    pair[1].shutdown(socket.SHUT_RDWR)
    assert without_pidfds(lambda: end.code(PATIENCE)) is None
    assert end.other_has_ended
    # There is room again.
    os.kill(child, signal.SIGKILL)
    assert end.code(PATIENCE) == -signal.SIGKILL


def test_one_that_has_ended_for_its_tracer_only_is_waited_for(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """Whoever waits looks now and then, and not all the time."""
    child = child_that(signal.pause)
    end = ChildEnd(child, pair[0])
    with traced(child):
        os.kill(child, signal.SIGKILL)
        assert end.code(PATIENCE) is None
        assert not end.other_has_ended
        began = time.monotonic()
        assert end.code(0.2) is None
        assert time.monotonic() - began > 0.19
        pair[1].shutdown(socket.SHUT_RDWR)
        assert end.code(PATIENCE) is None
        assert end.other_has_ended
    code = None
    while code is None:
        code = end.code(0.01)
    assert code == -signal.SIGKILL


def test_one_that_stops_as_it_is_traced_has_not_ended(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    child = child_that(stop_as_traced)
    end = ChildEnd(child, pair[0])
    eventually(lambda: ") t " in Path(f"/proc/{child}/stat").read_text(), "a stop")
    assert end.code(0) is None
    os.kill(child, signal.SIGKILL)
    assert end.code(PATIENCE) == -signal.SIGKILL


def test_a_module_that_hangs_is_killed_where_nothing_tells(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minder, "_LOOK", 0.01)
    hangs: Any = SimpleNamespace(hangs=True)

    def watch() -> int:
        return minder._watch(child_that(signal.pause), pair[0], hangs)

    assert without_pidfds(watch) == minder._HUNG


def test_a_minder_ends_with_keyd_where_nothing_tells(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minder, "_FAREWELL", 0.01)
    fine: Any = SimpleNamespace(hangs=False)

    def mind() -> None:
        pair[1].shutdown(socket.SHUT_RDWR)
        minder._watch(child_that(signal.pause), pair[0], fine)

    process = without_pidfds(lambda: child_that(mind))
    pair[1].shutdown(socket.SHUT_RDWR)
    assert os.waitpid(process, 0)[1] == 0


class Named(KeySources):
    """A file that holds no key."""

    def load(self) -> Iterator[tuple[str, PrivateKey | UnusableKey]]:
        yield "file", UnusableKey("file", "file: no key")


def test_files_are_read_again_where_nothing_tells() -> None:
    sources = Named((), None, None)
    before = children()
    with without_pidfds(lambda: start_reader(sources, must_lock=False)) as reader:
        reader.settimeout(PATIENCE)
        for _ in range(2):
            reader.send(ORDER)
            assert reader.recv(1000)[:1] == b"B"
            assert reader.recv(1000) == b"E"
    (reader_pid,) = children() - before
    os.waitpid(reader_pid, 0)
