"""The system calls that the resolver may make: data for its filter.

No program is started, no other process reached, nothing written but to sockets. A call that is not
here fails (ENOSYS) and does not end the process: the modules of nsswitch.conf(5) are not ours, and
can do without much that they try.
"""

import os
import socket

from keyd.linux.seccomp import Only, Rules

__all__ = ["RESOLVING"]

_ANYHOW: tuple[tuple[Only, ...], ...] = ((),)
_32_BITS = 0xFFFF_FFFF
_WRITING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: clone(2): only a thread of this process.
_CLONE_THREAD = 0x0001_0000
#: <linux/socket.h>
_SOL_NETLINK = 270

#: Any option of these levels, and a few of SOL_SOCKET. SO_LINGER is not among them: who closes the
#: last descriptor of a socket with it waits, and that could be the supervisor, to whom a descriptor
#: was sent.
_OPTIONS = (
    *((Only(1, _32_BITS, level),) for level in (socket.IPPROTO_IP, socket.IPPROTO_IPV6)),
    (Only(1, _32_BITS, socket.IPPROTO_TCP),),
    (Only(1, _32_BITS, _SOL_NETLINK),),
    *(
        (Only(1, _32_BITS, socket.SOL_SOCKET), Only(2, _32_BITS, option))
        for option in (
            socket.SO_BROADCAST,
            socket.SO_KEEPALIVE,
            socket.SO_PASSCRED,
            socket.SO_RCVBUF,
            socket.SO_RCVTIMEO,
            socket.SO_REUSEADDR,
            socket.SO_SNDBUF,
            socket.SO_SNDTIMEO,
        )
    ),
)

RESOLVING: Rules = {
    # Sockets: name servers, local services (nscd, systemd-resolved, Avahi), and the kernel's own
    # addresses (rtnetlink(7)), by which getaddrinfo(3) sorts.
    "socket": (
        *(
            (Only(0, _32_BITS, family), Only(1, 0xF, kind))
            for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
        ),
        (Only(0, _32_BITS, socket.AF_NETLINK), Only(2, _32_BITS, socket.NETLINK_ROUTE)),
    ),
    "connect": _ANYHOW,
    # Of a netlink socket.
    "bind": _ANYHOW,
    "getsockname": _ANYHOW,
    "getpeername": _ANYHOW,
    "getsockopt": _ANYHOW,
    "setsockopt": _OPTIONS,
    "shutdown": _ANYHOW,
    "sendto": _ANYHOW,
    "sendmsg": _ANYHOW,
    "sendmmsg": _ANYHOW,
    "recvfrom": _ANYHOW,
    "recvmsg": _ANYHOW,
    "poll": _ANYHOW,
    "ppoll": _ANYHOW,
    "select": _ANYHOW,
    "pselect6": _ANYHOW,
    "epoll_create1": _ANYHOW,
    "epoll_ctl": _ANYHOW,
    "epoll_wait": _ANYHOW,
    "epoll_pwait": _ANYHOW,
    # FIONREAD, FIONBIO.
    "ioctl": ((Only(1, _32_BITS, 0x541B),), (Only(1, _32_BITS, 0x5421),)),
    "fcntl": _ANYHOW,
    "close": _ANYHOW,
    # Files, to be read.
    "openat": ((Only(2, _WRITING, os.O_RDONLY),),),
    "read": _ANYHOW,
    "pread64": _ANYHOW,
    "readv": _ANYHOW,
    "lseek": _ANYHOW,
    "fstat": _ANYHOW,
    "newfstatat": _ANYHOW,
    "statx": _ANYHOW,
    "access": _ANYHOW,
    "faccessat": _ANYHOW,
    # To sockets, as some modules do.
    "write": _ANYHOW,
    "writev": _ANYHOW,
    # Memory. Modules are loaded when they are first needed, so some of it becomes executable.
    "brk": _ANYHOW,
    "mmap": _ANYHOW,
    "mprotect": _ANYHOW,
    "mremap": _ANYHOW,
    "munmap": _ANYHOW,
    "madvise": _ANYHOW,
    # Threads. clone3(2) has its flags in memory, where no filter can see them: glibc goes on with
    # clone(2).
    "clone": ((Only(0, _CLONE_THREAD, _CLONE_THREAD),),),
    "set_robust_list": _ANYHOW,
    "rseq": _ANYHOW,
    "sched_getaffinity": _ANYHOW,
    "sched_yield": _ANYHOW,
    "futex": _ANYHOW,
    "membarrier": _ANYHOW,
    "exit": _ANYHOW,
    "exit_group": _ANYHOW,
    # Its parent-death signal, and threads' names.
    "prctl": _ANYHOW,
    "rt_sigaction": _ANYHOW,
    "rt_sigprocmask": _ANYHOW,
    "rt_sigreturn": _ANYHOW,
    "sigaltstack": _ANYHOW,
    "restart_syscall": _ANYHOW,
    # Time, randomness, and who it is.
    "clock_gettime": _ANYHOW,
    "clock_nanosleep": _ANYHOW,
    "gettimeofday": _ANYHOW,
    "getrandom": _ANYHOW,
    "getpid": _ANYHOW,
    "gettid": _ANYHOW,
    "getuid": _ANYHOW,
    "geteuid": _ANYHOW,
    "getgid": _ANYHOW,
    "getegid": _ANYHOW,
    "uname": _ANYHOW,
}
