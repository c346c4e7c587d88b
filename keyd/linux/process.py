"""Making a process, in new namespaces where asked (clone(2), namespaces(7), pidfd_open(2)).

Run by the fork server, which is root and has one thread; and, as they start, by the
programs that an administrator or a service manager starts.
"""

import os
import struct
from collections.abc import Iterable
from typing import NamedTuple

from keyd.linux.spawn import NUMBERS, spawn

__all__ = [
    "CLONE_NEWIPC",
    "CLONE_NEWNET",
    "CLONE_NEWPID",
    "CLONE_NEWUTS",
    "CLONE_PARENT",
    "Call",
    "Child",
    "clone",
    "open_standard_streams",
]

#: The child's parent is the caller's; what a process that is process 1 of its pid
#: namespace may not do.
CLONE_PARENT = 0x0000_8000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

_CALL = struct.Struct("=7q")


class Call(NamedTuple):
    """A system call by its name (one of ``spawn.NUMBERS``) with its arguments, at most six.

    A pointer is an address, of what has to stay where it is.
    """

    name: str
    arguments: tuple[int, ...]

    def encode(self) -> bytes:
        return _CALL.pack(NUMBERS[self.name], *self.arguments, *(0,) * (6 - len(self.arguments)))


class Child(NamedTuple):
    """A new process to its maker; in itself, ``pid`` is 0 and ``failed`` may say why."""

    pid: int
    pidfd: int
    failed: str


def clone(flags: int = 0, calls: Iterable[Call] = ()) -> Child:
    """Fork this process, its child in the namespaces that ``flags`` names.

    In the child the calls are made, in order, before it returns; at the first that fails
    it returns with that one's name and reason. The pidfd is close-on-exec. Raises OSError,
    and there is no child, as clone(2) does: EAGAIN where a limit on processes is reached,
    ENOMEM, EPERM without CAP_SYS_ADMIN.

    The system call is made directly: neither Python's nor libc's after-fork hooks
    run. They mend what other threads may have held locked, and there are none;
    what they touch costs some 180 page faults in each child. What the child must
    renew is its randomness, before it draws any.
    """
    calls = list(calls)
    pid, pidfd, failed, error = spawn(flags, b"".join(call.encode() for call in calls))
    if failed < 0:
        return Child(pid, pidfd, "")
    return Child(pid, pidfd, f"{calls[failed].name}: {os.strerror(error)}")


def open_standard_streams() -> None:
    """Make sure that descriptors 0, 1 and 2 are taken, by /dev/null if need be.

    Whoever was started without one of them would have a socket or a key file of its own
    there, and then what is meant for standard error would go into that.
    """
    for _ in range(3):
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)
