"""Processes: the calls that a new one makes first, how it ended, what it starts out with.

Run by the fork server, which is root and has one thread. Programs that an administrator
or a service manager starts run parts of it as they start.
"""

import gc
import os
import select
import signal
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

from keyd.linux.calls import NUMBERS, make

__all__ = [
    "CLONE_NEWIPC",
    "CLONE_NEWNET",
    "CLONE_NEWPID",
    "CLONE_NEWUTS",
    "CLONE_PARENT",
    "Call",
    "encode",
    "how_ended",
    "leave",
    "make",
    "open_standard_streams",
    "run_for_reader",
    "signals_held_back",
    "why_failed",
]

#: The child gets the caller's own parent as its parent. Process 1 of a pid namespace may
#: not use this.
CLONE_PARENT = 0x0000_8000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

_FOR_THE_FIRST_PROCESS = frozenset(
    {
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
        # Python ignores SIGPIPE once it runs.
        signal.SIGPIPE,
    }
)
_CALL = struct.Struct("=7q")
_ZEROS = (0,) * 6


class Call(NamedTuple):
    """A system call by its name (one of ``calls.NUMBERS``) with its arguments, at most six.

    A pointer is passed as an address; what is there has to stay there.
    """

    name: str
    arguments: tuple[int, ...]


def encode(calls: Iterable[Call]) -> bytes:
    """Encode calls for ``make``, and for ``forking.fork_as_ordered``."""
    return b"".join(
        _CALL.pack(NUMBERS[name], *arguments, *_ZEROS[len(arguments) :])
        for name, arguments in calls
    )


def why_failed(calls: Sequence[Call], failed: int, error: int) -> str:
    """Which call failed (its index, -1 for none) and why (an errno); nothing if none did."""
    return "" if failed < 0 else f"{calls[failed].name}: {os.strerror(error)}"


def how_ended(code: int) -> str:
    """How a process ended, in words; a negative ``code`` is the number of a signal."""
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"killed by signal {-code}"


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Block signals that are for the first process, in all processes that are started meanwhile.

    ``systemctl kill`` sends them to each process of a unit, a terminal to a process group. By
    default they end a process, even before it has run its first line. The signal mask is
    inherited through fork(2) and execve(2).
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_FIRST_PROCESS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_for_reader(run: Callable[[], int]) -> int:
    """Run a command that writes to standard output; returns its exit code.

    If nobody reads its output any more (``| head``), the exit code is that of SIGPIPE. If it
    cannot be written (``> file``, and the disk is full), that is 1, and standard error says why.
    """
    try:
        try:
            return run()
        finally:
            # sys.stdout is None if its descriptor was closed at the start.
            if sys.stdout is not None:
                sys.stdout.flush()
            # What is left need not be searched for cycles as the interpreter ends.
            gc.freeze()
    except BrokenPipeError:
        if not any(map(_is_unread, (1, 2))):
            raise
        # Python still writes what is left as it ends: that goes to /dev/null.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in filter(_is_unread, (1, 2)):
            os.dup2(nowhere, descriptor)
        return 128 + signal.SIGPIPE
    except OSError:
        if not (reason := _why_unwritten()):
            raise
        program = os.path.basename(sys.argv[0])
        print(f"{program}: standard output: {reason}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


def _why_unwritten() -> str:
    """Why standard output takes no more; empty if it does, and then the line is at an end."""
    try:
        os.write(1, b"\n")
    except OSError as error:
        return os.strerror(error.errno or 0)
    return ""


def leave(code: int) -> NoReturn:
    """End the process, with nothing left to do: no thread is waited for.

    An interpreter takes all down that it has loaded, piece by piece. The kernel does it at once.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)


def _is_unread(descriptor: int) -> bool:
    """Whether the descriptor is a pipe or a socket whose other end is closed (poll(2))."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def open_standard_streams() -> None:
    """Make sure that descriptors 0, 1 and 2 are taken, by /dev/null if need be.

    Otherwise a process that was started without one of them would open a socket or a key file
    under that number, and text for standard error would be written into it.
    """
    for _ in range(3):
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)
