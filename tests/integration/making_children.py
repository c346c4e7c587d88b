"""What ``test_forking`` looks at, as a program: one thread, and no test runner to be forked.

Its arguments: the name of what to do, and builds of keyd/linux/calls.c and of
titus_py/fork_server/forking.c, or nothing for those that are installed. It prints what came of
it, as JSON.
"""

import ctypes
import fcntl
import json
import mmap
import os
import platform
import signal
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterator

from builds import use_build

if len(sys.argv) > 2:
    use_build("keyd.linux.calls", sys.argv[2])
    use_build("titus_py.fork_server.forking", sys.argv[3])

from bench.forking import Child, fork_once
from keyd.linux.descriptors import receive_descriptors, send_descriptors
from keyd.linux.process import CLONE_NEWPID, CLONE_PARENT, Call, encode, make, why_failed
from titus_py.between.messages import FORKED_OCTETS, Fork, Forked
from titus_py.fork_server.forking import ORDERED, fork_as_ordered

CLONE_THREAD = 0x0001_0000
#: No list of calls of ours may have these.
_KILL, _EXIT = (62, 60) if platform.machine() == "x86_64" else (129, 93)
_reading, _writing = os.pipe()


def in_child(child: Child, *found: object) -> None:
    """Have the parent be told, and be no more."""
    os.write(_writing, json.dumps(found).encode())
    os._exit(7)


def of_child(child: Child) -> list[object]:
    """What it said, and how it ended."""
    said: list[object] = json.loads(os.read(_reading, 65536))
    ended = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
    assert ended is not None
    assert ended.si_pid == child.pid
    return [*said, ended.si_status]


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def calls_in_order() -> list[object]:
    calls = [Call("dup3", (0, 100, 0)), Call("dup3", (100, 101, 0))]
    calls.append(Call("close_range", (100, 100, 0)))
    child = fork_once(0, encode(calls))
    if not child.pid:
        in_child(child, child, is_open(100), is_open(101))
    return [is_open(100), is_open(101), *of_child(child)]


def calls_to_the_first_that_fails() -> list[object]:
    calls = [Call("dup3", (0, 100, 0)), Call("dup3", (-1, 101, 0)), Call("close_range", (100, 101))]
    child = fork_once(0, encode(calls))
    if not child.pid:
        in_child(
            child, child, why_failed(calls, child.failed, child.error), is_open(100), is_open(101)
        )
    return of_child(child)


def arguments_of_64_bits() -> list[object]:
    """Six of them, an address among them."""
    file = os.memfd_create("page")
    os.ftruncate(file, mmap.PAGESIZE)
    page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    writable, fixed = mmap.PROT_READ | mmap.PROT_WRITE, 0x10
    calls = [
        Call("mmap", (address, mmap.PAGESIZE, writable, mmap.MAP_SHARED | fixed, file, 0)),
    ]
    child = fork_once(0, encode(calls))
    if not child.pid:
        page[:5] = b"child"
        in_child(child, child)
    return [address > 1 << 32, *of_child(child), os.pread(file, 5, 0).decode(), page[0]]


def no_calls() -> list[object]:
    child = fork_once()
    if not child.pid:
        in_child(child, child, os.getppid())
    flags = fcntl.fcntl(child.pidfd, fcntl.F_GETFD)
    with open(f"/proc/self/fdinfo/{child.pidfd}") as file:
        of = dict(line.split(":", 1) for line in file.read().splitlines())
    right = int(of["Pid"]) == child.pid
    said, parent, status = of_child(child)
    return [
        child.failed,
        bool(flags & fcntl.FD_CLOEXEC),
        right,
        said,
        parent == os.getpid(),
        status,
    ]


def a_sibling() -> list[object]:
    """By a process between, as whose children the kernel does not count it."""
    between = os.fork()
    if not between:
        child = fork_once(CLONE_PARENT)
        if not child.pid:
            in_child(child, os.getppid())
        try:
            os.waitpid(child.pid, os.WNOHANG)
        except ChildProcessError:
            os._exit(3)
        os._exit(4)
    parent = json.loads(os.read(_reading, 100))[0]
    statuses = {os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]) for _ in range(2)}
    return [parent == os.getpid(), sorted(statuses)]


def in_a_namespace() -> list[object]:
    child = fork_once(CLONE_NEWPID)
    if not child.pid:
        in_child(child, os.getpid())
    return of_child(child)


def _no_children() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def calls_of_our_own() -> list[object]:
    """Without a child."""
    make(encode([Call("dup3", (0, 100, 0)), Call("dup3", (100, 101, 0))]))
    made = [is_open(100), is_open(101)]
    try:
        make(
            encode(
                [
                    Call("close_range", (100, 100, 0)),
                    Call("dup3", (100, 102, 0)),
                    Call("close_range", (101, 101, 0)),
                ]
            )
        )
    except OSError as error:
        return [*made, error.errno, is_open(100), is_open(101)]
    return made


def broken_blobs() -> list[object]:
    said = []
    for octets in (b"x", bytes(55), bytes(57), bytes(56 * 3 + 8)):
        for take in (make, lambda octets: fork_once(0, octets)):
            try:
                take(octets)
            except ValueError as error:
                said.append(str(error))
    return [said, _no_children()]


def what_clone_refuses() -> list[object]:
    before = len(os.listdir("/proc/self/fd"))
    child = fork_once(CLONE_THREAD)
    return [child, _no_children(), len(os.listdir("/proc/self/fd")) - before]


def what_the_order_says() -> list[object]:
    """In place of arguments: a child that would dup3(2) the wrong descriptors fails."""
    uid, report, end = ORDERED
    calls = [Call("dup3", (report, 100, 0)), Call("dup3", (end, 101, 0))]
    calls.append(Call("setresuid", (uid, uid, uid)))
    child = fork_once(0, encode(calls), 4_000_000_000)
    if not child.pid:
        page = os.readlink("/proc/self/fd/100")
        in_child(child, os.getuid(), "report" in page, stat.S_ISSOCK(os.fstat(101).st_mode))
    said, *ended = [*of_child(child)]
    return [[said, *ended[:2]], *ended[2:]]


class Parent:
    """Who orders; the loop is run on the other end."""

    def __init__(self) -> None:
        self.ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def order(self, uid: int = 0) -> None:
        self.send(Fork(uid).encode(), 2)

    def send(self, octets: bytes, count: int) -> None:
        """With so many descriptors."""
        send_descriptors(self.ours, octets, [0] * count)

    def no_more(self) -> None:
        self.ours.shutdown(socket.SHUT_WR)

    def loop(
        self,
        calls: bytes = b"",
        *,
        uids: tuple[int, int] = (0, 0),
        around: tuple[bytes, bytes] = (b"", b""),
        title: tuple[int, bytes] = (0, b""),
    ) -> tuple[int, int] | None:
        before, after = around
        return fork_as_ordered(self._theirs.fileno(), *uids, 0, before, calls, after, *title)

    def answers(self) -> Iterator[Forked]:
        """All that have come. Each child is waited for."""
        while True:
            try:
                message, descriptors = receive_descriptors(
                    self.ours, FORKED_OCTETS + 1, 1, socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                return
            yield (forked := Forked.decode(message))
            if forked.pid:
                os.close(descriptors[0])
                os.waitpid(forked.pid, 0)


def a_title() -> list[object]:
    """Written by the child, into its own memory."""
    memory = ctypes.create_string_buffer(b"before\0\0\0")
    parent = Parent()
    parent.order()
    parent.no_more()
    if parent.loop(title=(ctypes.addressof(memory), b"a worker\0")) is not None:
        in_child(Child(0, -1, -1, 0), memory.value.decode())
    (answer,) = parent.answers()
    return [*json.loads(os.read(_reading, 100)), answer.error, memory.value.decode()]


def refused_order(octets: bytes, count: int, uids: tuple[int, int] = (0, 0)) -> str:
    """What is said of it; nobody has been forked, and nobody been answered."""
    parent = Parent()
    parent.send(octets, count)
    try:
        parent.loop(uids=uids)
    except ValueError as error:
        assert [*parent.answers()] == []
        return str(error)
    return "taken"


def no_orders() -> list[object]:
    """Cut short, too long, two in one, something else, no descriptors, too few, too many."""
    order = Fork(0).encode()
    said = {
        refused_order(octets, count)
        for octets, count in (
            (order[:1], 2),
            (order[:-1], 2),
            (order + b"\0", 2),
            (order + order, 2),
            (order + order, 4),
            (b"X" + order[1:], 2),
            (order, 0),
            (order, 1),
            (order, 3),
            (order, 4),
        )
    }
    return [*said, _no_children()]


def uids_of_others() -> list[object]:
    uids = (0, 1, 1021, 1026, 1023 << 32, (1 << 32) + 1023, -1, -1023, -(1 << 63), (1 << 63) - 1)
    said = {refused_order(Fork(uid).encode(), 2, (1022, 1025)) for uid in uids}
    parent = Parent()
    for uid in (1022, 1023, 1024, 1025):
        parent.order(uid)
    parent.no_more()
    if parent.loop(uids=(1022, 1025)) is not None:
        os._exit(0)
    answered = [answer.uid for answer in parent.answers()]
    return [*said, _no_children(), answered]


def nobody_orders() -> list[object]:
    parent = Parent()
    parent.ours.close()
    return [parent.loop(), _no_children()]


def nobody_waits_for_the_answer() -> list[object]:
    parent = Parent()
    parent.order()
    parent.ours.close()
    try:
        if parent.loop() is not None:
            os._exit(0)
    except BrokenPipeError:
        return [os.waitstatus_to_exitcode(os.wait()[1]), _no_children()]
    return ["answered"]


def around_a_fork() -> list[object]:
    """The caller's calls are made around each fork, and are the caller's only."""
    memory = os.memfd_create("around")
    text = ctypes.create_string_buffer(b"ba", 2)
    calls = [encode([Call("pwrite64", (memory, ctypes.addressof(text) + n, 1, 0))]) for n in (0, 1)]
    parent = Parent()
    parent.order()
    parent.order()
    parent.no_more()
    if parent.loop(around=(calls[0], calls[1])) is not None:
        os._exit(0)
    codes = [(answer.error, answer.pid > 0) for answer in parent.answers()]
    said = [os.pread(memory, 9, 0).decode(), codes]
    fails = encode([Call("pwrite64", (-1, 0, 0, 0))])
    for around in ((fails, b""), (b"", fails)):
        parent = Parent()
        parent.order()
        try:
            if parent.loop(around=around) is not None:
                os._exit(0)
        except OSError as error:
            said.append(error.errno)
        # Whoever cannot do these things does not go on, and answers nothing.
        said.append([*parent.answers()])
    os.wait()
    return [*said, _no_children()]


def a_signal() -> list[object]:
    """One with a handler is handled while there are no orders, and the loop goes on."""
    handled: list[int] = []
    parent = Parent()

    def handle(*_: object) -> None:
        handled.append(1)
        if len(handled) == 2:
            parent.no_more()

    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    said = parent.loop()
    signal.setitimer(signal.ITIMER_REAL, 0)
    return [said, len(handled) >= 2, _no_children()]


def a_signal_before_the_last_call() -> list[object]:
    """A handler, which is Python, runs when all calls have been made; who forked goes on."""
    os.setpgid(0, 0)
    handled: list[bool] = []
    signal.signal(signal.SIGUSR1, lambda *_: handled.append(is_open(100)))
    everybody = struct.pack("=7q", _KILL, 0, signal.SIGUSR1, 0, 0, 0, 0)
    parent = Parent()
    parent.order()
    parent.order()
    parent.no_more()
    if parent.loop(everybody + encode([Call("dup3", (0, 100, 0))])) is not None:
        os.write(_writing, bytes(handled[:1]))
        os._exit(0)
    answers = [answer.error for answer in parent.answers()]
    return [answers, [*os.read(_reading, 2)], {*handled} == {False}, _no_children()]


def ended_by_the_first_call() -> list[object]:
    """It is answered for as any other."""
    parent = Parent()
    parent.order()
    parent.order()
    parent.no_more()
    exit_at_once = struct.pack("=7q", _EXIT, 3, 0, 0, 0, 0, 0)
    if parent.loop(exit_at_once) is not None:
        os._exit(0)
    return [[answer.error for answer in parent.answers()], _no_children()]


def many() -> list[object]:
    """One after the other: nothing is left open, nothing is mixed up."""
    before = len(os.listdir("/proc/self/fd"))
    right = 0
    for number in range(200):
        child = fork_once(0, encode([Call("dup3", (0, 100 + number, 0))] * (number % 5)))
        if not child.pid:
            in_child(child, number, is_open(100 + number), child.failed)
        right += of_child(child) == [number, number % 5 > 0, -1, 7]
        os.close(child.pidfd)
    return [right, len(os.listdir("/proc/self/fd")) - before]


THINGS: dict[str, Callable[[], list[object]]] = {
    thing.__name__: thing
    for thing in (
        calls_in_order,
        calls_to_the_first_that_fails,
        arguments_of_64_bits,
        no_calls,
        a_sibling,
        in_a_namespace,
        calls_of_our_own,
        broken_blobs,
        what_clone_refuses,
        what_the_order_says,
        a_title,
        no_orders,
        uids_of_others,
        nobody_orders,
        nobody_waits_for_the_answer,
        around_a_fork,
        a_signal,
        a_signal_before_the_last_call,
        ended_by_the_first_call,
        many,
    )
}

if __name__ == "__main__":
    print(json.dumps(THINGS[sys.argv[1]]()))
