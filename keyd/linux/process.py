"""Making a process, in new namespaces where asked (clone(2), namespaces(7), pidfd_open(2)).

Run by the parent, which is root and has one thread; and, as they start, by the programs
that an administrator or a service manager starts.
"""

import ctypes
import os

__all__ = [
    "CLONE_NEWIPC",
    "CLONE_NEWNET",
    "CLONE_NEWPID",
    "CLONE_NEWUTS",
    "clone",
    "open_standard_streams",
]

CLONE_PIDFD = 0x0000_1000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

#: clone(2) and not clone3(2): a service manager's filter on namespaces sees only the flags
#: of the former (systemd.exec(5), RestrictNamespaces=).
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
_SIGCHLD = 17

# PyDLL keeps the GIL over the call, so that the child has it, too.
_libc = ctypes.PyDLL(None, use_errno=True)
_pidfd = ctypes.c_int(-1)


def clone(flags: int = 0) -> tuple[int, int]:
    """Fork this process, its child in the namespaces that ``flags`` names.

    Returns (pid, pidfd) in the parent and (0, -1) in the child. The pidfd is
    close-on-exec. Raises OSError, as clone(2) does: EAGAIN where a limit on
    processes is reached, ENOMEM, EPERM without CAP_SYS_ADMIN.

    The system call is made directly: neither Python's nor libc's after-fork hooks
    run. They mend what other threads may have held locked, and there are none;
    what they touch costs some 180 page faults in each child. What the child must
    renew is its randomness, and that is its own first act.
    """
    # No stack: the child goes on with its copy of ours. The pidfd is stored where
    # CLONE_PARENT_SETTID would store the child's id.
    pid = _libc.syscall(_SYS_CLONE, flags | CLONE_PIDFD | _SIGCHLD, 0, ctypes.byref(_pidfd), 0, 0)
    if pid < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"clone: {os.strerror(error)}")
    return (pid, _pidfd.value) if pid else (0, -1)


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
