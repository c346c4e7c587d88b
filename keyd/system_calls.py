"""The system calls that keyd may make once it serves, and ``keyd make``: data for their filters.

No file is opened, no socket made, no program started, no memory made executable.
"""

import mmap

from keyd.linux.seccomp import Only, Rules

__all__ = ["MAKING", "SERVING"]

_ANYHOW: tuple[tuple[Only, ...], ...] = ((),)
_NOT_EXECUTABLE = ((Only(2, mmap.PROT_EXEC, 0),),)

SERVING: Rules = {
    # Channels: opened by the parent (recvmsg), or by a client that may connect (accept4).
    "epoll_wait": _ANYHOW,
    "epoll_pwait": _ANYHOW,
    "epoll_ctl": _ANYHOW,
    "recvmsg": _ANYHOW,
    "accept4": _ANYHOW,
    "recvfrom": _ANYHOW,
    "sendto": _ANYHOW,
    "shutdown": _ANYHOW,
    "close": _ANYHOW,
    "getsockname": _ANYHOW,
    "getsockopt": _ANYHOW,
    # FIONBIO.
    "ioctl": ((Only(1, 0xFFFF_FFFF, 0x5421),),),
    # Standard error.
    "write": _ANYHOW,
    # Memory, none of it executable.
    "brk": _ANYHOW,
    "mmap": _NOT_EXECUTABLE,
    "mprotect": _NOT_EXECUTABLE,
    "mremap": _ANYHOW,
    "munmap": _ANYHOW,
    "madvise": _ANYHOW,
    # OpenSSL: to see whether it was forked, and for fresh entropy.
    "getpid": _ANYHOW,
    "getrandom": _ANYHOW,
    # Threads and time.
    "futex": _ANYHOW,
    "sched_yield": _ANYHOW,
    "clock_gettime": _ANYHOW,
    "clock_nanosleep": _ANYHOW,
    "restart_syscall": _ANYHOW,
    "rt_sigreturn": _ANYHOW,
    "rt_sigprocmask": _ANYHOW,
    "rt_sigaction": _ANYHOW,
    "exit": _ANYHOW,
    "exit_group": _ANYHOW,
}

MAKING: Rules = {
    # Orders, with the descriptors that are read and written; and answers.
    "recvmsg": _ANYHOW,
    "sendto": _ANYHOW,
    "read": _ANYHOW,
    "write": _ANYHOW,
    "close": _ANYHOW,
    # Memory, none of it executable.
    "brk": _ANYHOW,
    "mmap": _NOT_EXECUTABLE,
    "mprotect": _NOT_EXECUTABLE,
    "mremap": _ANYHOW,
    "munmap": _ANYHOW,
    "madvise": _ANYHOW,
    # OpenSSL: to see whether it was forked, and for fresh entropy.
    "getpid": _ANYHOW,
    "getrandom": _ANYHOW,
    # Locks, and the end.
    "futex": _ANYHOW,
    "rt_sigreturn": _ANYHOW,
    "rt_sigprocmask": _ANYHOW,
    "exit_group": _ANYHOW,
}
