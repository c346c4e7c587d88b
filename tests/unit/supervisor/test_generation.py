"""What the supervisor tells its children, however slow they are to hear it; and uids."""

import errno
import gc
import json
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pyseccomp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titus_py.between.event_loop import EventLoop
from titus_py.configuration import load
from titus_py.configuration.address import UnixAddress
from titus_py.configuration.checking import CertificateFacts, Checked
from titus_py.configuration.file_watch import FileWatch
from titus_py.supervisor import child as child_module
from titus_py.supervisor import reaping
from titus_py.supervisor.child import Child, start_keyd
from titus_py.supervisor.children import Children
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.lending_socket import LendingSocket
from titus_py.supervisor.planning import plan_of
from titus_py.supervisor.uid_blocks import free_block


@pytest.fixture
def child_and_ear() -> Iterator[tuple[Child, socket.socket]]:
    """A child that is about to end, and its end of the socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    child = Child("child", subprocess.Popen(["true"]), ours)
    with theirs:
        yield child, theirs
    if ours.fileno() >= 0:
        child.bury()


def descriptors() -> int:
    # What other tests have left to the collector is closed now, and not while it is counted.
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_a_slow_child_hears_all_orders_in_order(
    child_and_ear: tuple[Child, socket.socket],
) -> None:
    child, ear = child_and_ear
    orders = [{"do": "use backend", "backend": f"{number}:80"} for number in range(3000)]
    assert [child.queue(order) for order in orders] == [True] + [False] * 2999
    assert not child.send_orders(), "it takes a part of them"
    heard = []
    while True:
        try:
            heard.append(json.loads(ear.recv(4096)))
        except BlockingIOError:
            if child.send_orders() and len(heard) == len(orders):
                break
    assert heard == orders
    assert child.queue({}), "nothing waits any more"


def test_a_descriptor_may_be_closed_once_it_is_queued(
    child_and_ear: tuple[Child, socket.socket],
) -> None:
    child, ear = child_and_ear
    before = descriptors()
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            child.queue({"do": "use keyd"}, [theirs.fileno()])
        assert child.send_orders()
        message, (received,), _, _ = socket.recv_fds(ear, 4096, 1)
        assert json.loads(message) == {"do": "use keyd"}
        os.write(received, b"still open")
        assert ours.recv(64) == b"still open"
        os.close(received)
    assert descriptors() == before


def test_what_nobody_will_hear_is_dropped(child_and_ear: tuple[Child, socket.socket]) -> None:
    child, ear = child_and_ear
    before = descriptors()
    child.queue({"do": "use keyd"}, [ear.fileno()])
    child.queue({"do": "retire"})
    ear.close()
    assert child.send_orders()
    child.queue({"do": "use keyd"}, [0])
    child.bury()
    # Its pidfd and its socket, both ends.
    assert descriptors() == before - 3


@contextmanager
def room_for(more: int) -> Iterator[None]:
    """Meanwhile, this process gets at most so many new descriptors."""
    # What other tests have left to the collector would be some more.
    gc.collect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Those without a gap come first, so that the limit is that of their number.
    with ExitStack() as gaps:
        highest = max(map(int, os.listdir("/proc/self/fd")))
        while (filler := os.open(os.devnull, os.O_RDONLY)) < highest:
            gaps.callback(os.close, filler)
        os.close(filler)
        resource.setrlimit(resource.RLIMIT_NOFILE, (filler + more, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("predecessor", [False, True])
def test_a_keyd_that_cannot_be_started_leaves_no_descriptor(
    predecessor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: what is left over would be missing at the next attempt."""
    monkeypatch.setattr(child_module, "_KEYD", ("-c", "pass"))
    before, failures = descriptors(), 0
    for more in range(20):
        given = socket.socket() if predecessor else None
        with room_for(more):
            try:
                child, control = start_keyd({}, given)
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                failures += 1
                child = None
        if child is not None:
            control.close()
            child.bury()
        assert descriptors() == before, f"with {more} more"
    assert 5 < failures < 20


def test_a_keyd_that_cannot_be_watched_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would hear of it, nor end it."""
    monkeypatch.setattr(child_module, "_KEYD", ("-c", "import time; time.sleep(600)"))
    monkeypatch.setattr(reaping, "_late", [])

    def start() -> None:
        program = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
        program.add_rule(pyseccomp.ERRNO(errno.ENFILE), "pidfd_open")
        program.load()
        with pytest.raises(OSError, match="Too many open files in system"):
            start_keyd({}, None)

    # The filter is this thread's alone, and ends with it.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(start).result()
    (ended,) = reaping._late
    assert not isinstance(ended, int)
    assert ended.wait() == -signal.SIGKILL


def test_a_keyd_that_cannot_be_told_to_lend_is_no_end(
    child_and_ear: tuple[Child, socket.socket], tmp_path: Path
) -> None:
    """A descriptor is missing: that is said, and all else goes on."""
    child, ear = child_and_ear
    told: list[str] = []
    children = Children(EventLoop(), lambda *_, **__: None, lambda *_: None, lambda *_: None)
    lending = LendingSocket(
        children, lambda name, _generation=0, **fields: told.append(fields["reason"])
    )
    address = UnixAddress(str(tmp_path / "lend"))
    keyd = SimpleNamespace(lend=address)
    worker = SimpleNamespace(backend_gids=None)
    generation = cast(
        Generation,
        SimpleNamespace(
            configuration=SimpleNamespace(keyd=keyd, worker=worker), keyd=child, uids=range(9)
        ),
    )
    lending.change([generation])
    with room_for(0):
        lending.lend(generation)
    assert told
    assert set(told) == {f"keyd.lend: {address}: Too many open files"}
    lending.lend(generation)
    message, (received,), _, _ = socket.recv_fds(ear, 4096, 1)
    os.close(received)
    assert json.loads(message) == {"do": "lend"}
    lending.close()


BLOCKS = st.lists(
    st.tuples(st.integers(90, 220), st.integers(1, 40)).map(lambda b: range(b[0], b[0] + b[1])),
    max_size=6,
)


@given(BLOCKS, st.integers(1, 60))
def test_a_free_block_is_the_first_that_nobody_has(taken: list[range], count: int) -> None:
    uids = range(100, 200)
    block = free_block(uids, count, taken)
    fitting = [
        range(first, first + count)
        for first in range(uids.start, uids.stop - count + 1)
        if not any(first < one.stop and one.start < first + count for one in taken)
    ]
    assert block == (fitting[0] if fitting else None)


def test_a_parent_that_cannot_be_told_all_leaves_no_descriptor(tmp_path: Path) -> None:
    """Each directory's certificates are in a file of their own."""
    names = ("one", "two", "three")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "www.pem").touch()
    hosts = "".join(
        f'[[vhost]]\nlocal_address = "127.0.0.{number}"\ncertificate_dir = "{name}"\n'
        'backend = "127.0.0.1:80"\n'
        for number, name in enumerate(names, 1)
    )
    (tmp_path / "titus.toml").write_text(f'[[listen]]\naddress = ":443"\n{hosts}')
    loaded = load(tmp_path / "titus.toml")
    assert loaded.configuration is not None, loaded.mistakes
    facts = CertificateFacts("", bytes(32), "", "", ("www.example.org",), datetime.now(UTC))
    certificates = dict.fromkeys(loaded.credentials, facts)
    assert len(certificates) == len(names)
    files = FileWatch.of(certificates, [])
    checked = Checked(loaded.configuration, [], [], certificates, files)
    before, failures = descriptors(), 0
    for more in range(10):
        with room_for(more):
            try:
                plan = plan_of(loaded.configuration, checked, range(9), {}, {}, {}, "")
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                failures += 1
                plan = None
        if plan is not None:
            assert len(plan.indexes) == len(names)
            for index in plan.indexes:
                os.close(index)
        assert descriptors() == before, f"with {more} more"
    # The filter takes one as well.
    assert len(names) < failures < 10
