"""Health checks: what makes a backend go down and come up, and how often that is told."""

import errno
import itertools
import resource
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import pytest
from integration.peers import end_the_wait, lingering, nobody_waits_for
from integration.watches import without_watches

from titus_py.between.event_loop import EventLoop
from titus_py.between.plan import Check, Health, SocketAddress, State
from titus_py.parent import dialer
from titus_py.parent.backend import Backend
from titus_py.parent.health import Checks

#: For what must not fail for want of time.
PATIENCE = 20.0
QUICK = Health(every=0.01, timeout=5.0, fall=3, rise=2, send=None, expect=None)
LOCAL = b"\r\n\r\n\0\r\nQUIT\n" + struct.pack("!BBH", 0x20, 0, 0)

Talk = Callable[[socket.socket], None]


def says_half(connection: socket.socket) -> None:
    connection.sendall(b"+PO")
    hangs(connection)


def hangs(connection: socket.socket) -> None:
    """Says nothing until the check goes away."""
    connection.recv(4096)
    connection.recv(4096)


class Peer:
    """A backend in a thread; ``checks`` counts who came."""

    def __init__(self, talk: Talk = lambda _: None) -> None:
        self.talk = talk
        self.checks = 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.address = self.listener.getsockname()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection = self.listener.accept()[0]
            except OSError as error:
                if error.errno == errno.EMFILE:
                    continue
                return
            self.checks += 1
            with connection:
                try:
                    self.talk(connection)
                except OSError:
                    continue

    def close(self) -> None:
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._thread.join(PATIENCE)


class Checked:
    """A backend that is checked until the end of the test, and what was told of it."""

    def __init__(
        self,
        address: SocketAddress,
        health: Health,
        state: State | None = None,
        send_proxy: str | None = None,
    ) -> None:
        self.loop = EventLoop()
        self.told: list[tuple[float, str, dict[str, Any]]] = []
        check = Check("the backend", health, send_proxy)
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.backend = Backend("the backend", ((family, address),), check, state)
        self.checks = Checks(self.loop, [self.backend], self._tell)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.checks.stop()

    def _tell(self, event: str, report: int | None = None, **fields: Any) -> None:
        self.told.append((time.monotonic(), event, fields))

    def run(self, until: Callable[[], object], seconds: float = PATIENCE) -> None:
        over = False

        def stop() -> None:
            nonlocal over
            over = True

        timer = self.loop.after(seconds, stop)
        while not until() and not over:
            self.loop.run_once()
        timer.cancel()
        assert until() or seconds < PATIENCE


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def peer(stack: ExitStack, talk: Talk = lambda _: None) -> Peer:
    there = Peer(talk)
    stack.callback(there.close)
    return there


def test_down_after_so_many_failures_and_up_after_so_many_successes(stack: ExitStack) -> None:
    """Each is told once, with the reason and since when."""
    # Bound, and so nobody else's: one listens there later because both say SO_REUSEADDR.
    bound = stack.enter_context(socket.socket())
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", 0))
    address = bound.getsockname()
    checked = stack.enter_context(Checked(address, QUICK))
    checked.run(lambda: checked.told)
    _, event, fields = checked.told.pop()
    assert (event, fields["level"], fields["check"]) == ("backend_down", "error", 0)
    assert fields["reason"] == f"127.0.0.1:{address[1]}: Connection refused"
    assert not checked.backend.up
    with socket.create_server(address):
        checked.run(lambda: checked.told)
    assert [event for _, event, _ in checked.told] == ["backend_up"]
    assert checked.backend.up


def test_fewer_failures_than_that_change_nothing(stack: ExitStack) -> None:
    answers = iter([b"no", b"no", b"ok"] * 1000)
    there = peer(stack, lambda connection: connection.sendall(next(answers)))
    checked = stack.enter_context(Checked(there.address, QUICK._replace(expect="ok")))
    checked.run(lambda: there.checks >= 12)
    assert checked.told == []
    assert checked.backend.up


def test_what_another_parent_knew_holds_until_checks_say_otherwise(stack: ExitStack) -> None:
    there = peer(stack)
    checked = stack.enter_context(
        Checked(there.address, QUICK, State(False, 1.0, "Connection refused"))
    )
    assert not checked.backend.up
    checked.run(lambda: checked.told)
    checked.run(lambda: there.checks >= QUICK.rise)
    assert [event for _, event, _ in checked.told] == ["backend_up"]


@pytest.mark.parametrize(
    ("talk", "reason"),
    [
        (lambda peer: peer.sendall(b"+PONG\r\nand much more" * 1000), ""),
        (lambda peer: [peer.sendall(b"+PO"), time.sleep(0.01), peer.sendall(b"NG")], ""),
        (
            lambda peer: peer.sendall(b"\x1b\xff'\n no"),
            'its answer is not the expected one, but "\\x1b\\xff\'\\n "',
        ),
        (
            lambda peer: peer.sendall(b"+PON"),
            "closed the connection before it had answered, but for '+PON'",
        ),
        (lambda peer: None, "closed the connection before it had answered"),
        (hangs, "no answer in 1 s"),
        (says_half, "no answer in 1 s, but '+PO'"),
    ],
    ids=["more", "in pieces", "another", "too short", "closed", "nothing", "half"],
)
def test_an_answer_is_compared(stack: ExitStack, talk: Talk, reason: str) -> None:
    asked: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        asked.append(connection.recv(4096))
        talk(connection)

    there = peer(stack, answer)
    # So long that each check comes to ask, on a busy machine, too.
    health = QUICK._replace(
        timeout=1.0 if talk in (hangs, says_half) else 5.0, send="PING\r\n", expect="+PONG"
    )
    checked = stack.enter_context(
        Checked(there.address, health, None if reason else State(False, 1.0, "was down"))
    )
    checked.run(lambda: checked.told)
    _, event, fields = checked.told[0]
    assert (event, fields.get("reason", "")) == ("backend_down" if reason else "backend_up", reason)
    assert set(asked) == {b"PING\r\n"}


def test_of_a_long_answer_the_beginning_is_told(stack: ExitStack) -> None:
    there = peer(stack, lambda connection: connection.sendall(b"\0" * 2000))
    health = QUICK._replace(timeout=5.0, expect="a" * 1000)
    checked = stack.enter_context(Checked(there.address, health, None))
    checked.run(lambda: checked.told)
    ((_, _, fields),) = checked.told
    shown = 64 * r"\x00"
    assert fields["reason"] == f"its answer is not the expected one, but '{shown}'"


@pytest.mark.parametrize(
    ("send_proxy", "header"), [("v1", b"PROXY UNKNOWN\r\n"), ("v2", LOCAL), ("v2-tls", LOCAL)]
)
def test_a_backend_that_expects_a_proxy_header_gets_one(
    stack: ExitStack, send_proxy: str, header: bytes
) -> None:
    asked: list[bytes] = []
    there = peer(stack, lambda connection: asked.append(connection.recv(4096)))
    checked = stack.enter_context(Checked(there.address, QUICK, send_proxy=send_proxy))
    checked.run(lambda: len(asked) > 1)
    assert set(asked) == {header}


def test_a_check_that_hangs_is_one_at_a_time(stack: ExitStack) -> None:
    there = peer(stack, hangs)
    checked = stack.enter_context(
        Checked(there.address, QUICK._replace(timeout=0.3, expect="hello", fall=2))
    )
    checked.run(lambda: checked.told)
    # Beside each other, there would be sixty.
    assert there.checks <= 2


def test_a_backend_that_flaps_is_told_of_once_a_second(stack: ExitStack) -> None:
    """A hundred changes a second; the last line says what holds."""
    answers = iter([b"o", b"k"] * 100_000)
    there = peer(stack, lambda connection: connection.sendall(next(answers)))
    checked = stack.enter_context(
        Checked(there.address, QUICK._replace(fall=1, rise=1, expect="o"))
    )
    checked.run(lambda: len(checked.told) == 3)
    assert there.checks > 20
    times = [when for when, _, _ in checked.told]
    assert all(later - earlier > 0.9 for earlier, later in itertools.pairwise(times))
    assert all(fields["changes"] > 1 for _, _, fields in checked.told[1:])
    last = checked.told[-1][1]
    assert last == ("backend_up" if checked.backend.up else "backend_down")


def test_having_no_descriptor_left_says_nothing_of_the_backend(
    stack: ExitStack,
) -> None:
    there = peer(stack)
    checked = stack.enter_context(Checked(there.address, QUICK._replace(fall=1)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        checked.run(lambda: False, seconds=0.2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert checked.told == []
    checked.run(lambda: there.checks > 0)


def test_having_no_watch_left_says_nothing_of_the_backend(stack: ExitStack) -> None:
    there = peer(stack, lambda connection: connection.sendall(b"ok"))
    health = QUICK._replace(fall=1, expect="ok")
    checked = stack.enter_context(Checked(there.address, health))
    without_watches(lambda: checked.run(lambda: there.checks > 2), checked.loop._epoll)
    assert checked.told == []
    there.talk = lambda connection: connection.sendall(b"no")
    checked.run(lambda: checked.told)
    assert checked.told[0][1] == "backend_down"


def test_stopped_they_check_no_more(stack: ExitStack) -> None:
    there = peer(stack)
    checked = stack.enter_context(Checked(there.address, QUICK))
    checked.run(lambda: there.checks > 2)
    checked.checks.stop()
    checks = there.checks
    checked.run(lambda: False, seconds=0.2)
    assert there.checks - checks <= 1


@pytest.mark.parametrize("behind", [False, True], ids=["with its answer", "behind it"])
@pytest.mark.parametrize("kernel", ["since Linux 6.16", "before"])
def test_a_descriptor_that_a_backend_sends_makes_nobody_wait(
    stack: ExitStack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    behind: bool,
) -> None:
    """Whoever closes it would, for ten minutes: in receiving the answer, or in hanging up."""
    if kernel == "before":
        monkeypatch.setattr(dialer, "refuse_descriptors", lambda _: None)
    health = QUICK._replace(every=60.0, fall=1, rise=1, send="?", expect="yes")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "backend"))
        listener.listen()
        checked = stack.enter_context(
            Checked(listener.getsockname(), health, State(behind, 0.0, ""))
        )
        accepted = select.poll()
        accepted.register(listener, select.POLLIN)
        checked.run(lambda: accepted.poll(0))
        connection = listener.accept()[0]
    side, peer = lingering()
    if behind:
        connection.sendall(b"no")
    try:
        socket.send_fds(connection, [b"yes"], [side.fileno()])
    except PermissionError:
        connection.sendall(b"yes")
        end_the_wait(peer)
    side.close()
    with nobody_waits_for(peer):
        checked.run(lambda: checked.backend.up is not behind)
    connection.close()
    peer.close()
