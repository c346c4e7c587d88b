"""What ``test_spawn`` looks at, as a program: one thread, and no test runner to be forked.

Its arguments: the name of what to do, and a build of keyd/linux/spawn.c, or nothing for the
one that is installed. It prints what came of it, as JSON.
"""

import ctypes
import fcntl
import importlib.machinery
import importlib.util
import json
import mmap
import os
import sys
from collections.abc import Callable

if len(sys.argv) > 2:
    name = "keyd.linux.spawn"
    loader = importlib.machinery.ExtensionFileLoader(name, sys.argv[2])
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    loader.exec_module(sys.modules[name])

from keyd.linux.process import (
    CLONE_NEWPID,
    CLONE_PARENT,
    Call,
    Child,
    clone,
    encode,
    make,
    why_failed,
)
from keyd.linux.spawn import spawn

CLONE_THREAD = 0x0001_0000
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
    child = clone(0, encode(calls))
    if not child.pid:
        in_child(child, child, is_open(100), is_open(101))
    return [is_open(100), is_open(101), *of_child(child)]


def calls_to_the_first_that_fails() -> list[object]:
    calls = [Call("dup3", (0, 100, 0)), Call("dup3", (-1, 101, 0)), Call("close_range", (100, 101))]
    child = clone(0, encode(calls))
    if not child.pid:
        in_child(child, child, why_failed(child, calls), is_open(100), is_open(101))
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
    child = clone(0, encode(calls))
    if not child.pid:
        page[:5] = b"child"
        in_child(child, child)
    return [address > 1 << 32, *of_child(child), os.pread(file, 5, 0).decode(), page[0]]


def no_calls() -> list[object]:
    child = clone()
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
        child = clone(CLONE_PARENT)
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
    child = clone(CLONE_NEWPID)
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
        for take in (make, lambda octets: spawn(0, octets)):
            try:
                take(octets)
            except ValueError as error:
                said.append(str(error))
    return [said, _no_children()]


def what_clone_refuses() -> list[object]:
    before = len(os.listdir("/proc/self/fd"))
    child = clone(CLONE_THREAD)
    return [child, _no_children(), len(os.listdir("/proc/self/fd")) - before]


def many() -> list[object]:
    """One after the other: nothing is left open, nothing is mixed up."""
    before = len(os.listdir("/proc/self/fd"))
    right = 0
    for number in range(200):
        child = clone(0, encode([Call("dup3", (0, 100 + number, 0))] * (number % 5)))
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
        many,
    )
}

if __name__ == "__main__":
    print(json.dumps(THINGS[sys.argv[1]]()))
