"""The system calls that the metrics server may make: data for its filter.

It can accept clients, hear and answer them, and read a file that the supervisor sends. It can open,
make, connect and bind nothing. A call that is not here kills it.
"""

import mmap
import socket

from keyd.linux.seccomp import Only, Rules

__all__ = ["SERVING_METRICS"]

_ANYHOW: tuple[tuple[Only, ...], ...] = ((),)
_32_BITS, _64_BITS = 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF
_FIONBIO = 0x5421
_NOT_EXECUTABLE = Only(2, mmap.PROT_EXEC, 0)
#: mmap(2) of no file.
_OWN_MEMORY = (_NOT_EXECUTABLE, Only(3, mmap.MAP_ANONYMOUS, mmap.MAP_ANONYMOUS))

SERVING_METRICS: Rules = {
    "accept4": _ANYHOW,
    # Python asks an accepted socket what it is, and makes it non-blocking.
    "getsockname": _ANYHOW,
    "ioctl": ((Only(1, _32_BITS, _FIONBIO),),),
    "recvfrom": _ANYHOW,
    # send(2), to the connected peer only: with an address, it would reach others.
    "sendto": ((Only(3, _32_BITS, 0), Only(4, _64_BITS, 0), Only(5, _64_BITS, 0)),),
    # Only for writing. With SHUT_RD, the listening socket, which the supervisor has as well, would
    # listen no more.
    "shutdown": ((Only(1, _32_BITS, socket.SHUT_WR),),),
    # The text: a descriptor from the supervisor, and what is in it.
    "recvmsg": _ANYHOW,
    "read": _ANYHOW,
    "close": _ANYHOW,
    "epoll_ctl": _ANYHOW,
    "epoll_wait": _ANYHOW,
    "epoll_pwait": _ANYHOW,
    # Memory, none of it executable.
    "brk": _ANYHOW,
    "mmap": (_OWN_MEMORY,),
    "mprotect": ((_NOT_EXECUTABLE,),),
    "mremap": _ANYHOW,
    "munmap": _ANYHOW,
    "madvise": _ANYHOW,
    # Where the vDSO does not do it.
    "clock_gettime": _ANYHOW,
    "futex": _ANYHOW,
    "restart_syscall": _ANYHOW,
    "rt_sigreturn": _ANYHOW,
    "exit_group": _ANYHOW,
}
