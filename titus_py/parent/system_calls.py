"""The system calls that the parent may make once it is confined: data for its filter.

Data for the supervisor, which has the filter built. No file is opened, no program started, no
process made or looked into, nothing listened on. A call that is not listed kills the parent.
"""

import fcntl
import signal
import socket
import termios

from keyd.linux.seccomp import Only, Rules
from keyd.linux.unix_socket import SO_PASSRIGHTS
from titus_py.worker.system_calls import LOCK, NOT_EXECUTABLE, OWN_MEMORY

__all__ = ["FAILING", "parent_calls"]

_ANYHOW: tuple[tuple[Only, ...], ...] = ((),)
_ALL = 0xFFFF_FFFF
#: socket(2)'s type without SOCK_NONBLOCK and SOCK_CLOEXEC.
_TYPE = 0xF
_FIONBIO = 0x5421
#: <asm-generic/socket.h>
_SO_BINDTOIFINDEX = 62
#: <linux/time.h>
_ITIMER_REAL = 0
#: <linux/netlink.h>
_NETLINK_SOCK_DIAG = 4
#: <linux/fcntl.h>
_AT_EMPTY_PATH = 0x1000
_F_ADD_SEALS, _F_GET_SEALS = fcntl.F_ADD_SEALS, fcntl.F_GET_SEALS
# ip(7), ipv6(7). Python 3.11 does not know all of them.
_IP_TRANSPARENT, _IPV6_TRANSPARENT, _IP_BIND_ADDRESS_NO_PORT = 19, 75, 24


def _stream(family: int) -> tuple[Only, ...]:
    return Only(0, _ALL, family), Only(1, _TYPE, socket.SOCK_STREAM), Only(2, _ALL, 0)


def _option(level: int, option: int) -> tuple[Only, ...]:
    return Only(1, _ALL, level), Only(2, _ALL, option)


_SOCKETS = (
    _stream(socket.AF_INET),
    _stream(socket.AF_INET6),
    # The kernel's knowledge of connections (sock_diag(7)).
    (Only(0, _ALL, socket.AF_NETLINK), Only(2, _ALL, _NETLINK_SOCK_DIAG)),
)
_QUESTIONS = (
    # Python asks a socket to the next keyd, which it is given, what it is.
    _option(socket.SOL_SOCKET, socket.SO_TYPE),
    _option(socket.SOL_SOCKET, socket.SO_PROTOCOL),
    _option(socket.SOL_SOCKET, socket.SO_DOMAIN),
    # Whether there is room for a client's first octets; and how much there is for keyd's reports.
    _option(socket.SOL_SOCKET, socket.SO_RCVBUF),
    _option(socket.SOL_SOCKET, socket.SO_SNDBUF),
    # The interface that a client's socket is bound to, by which sock_diag finds it.
    _option(socket.SOL_SOCKET, _SO_BINDTOIFINDEX),
)
_OPTIONS = (
    _option(socket.SOL_SOCKET, socket.SO_LINGER),
    _option(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    # How many of a client's first octets to be woken for, and room for them.
    _option(socket.SOL_SOCKET, socket.SO_RCVLOWAT),
    _option(socket.SOL_SOCKET, socket.SO_RCVBUF),
    _option(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    _option(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    _option(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
    _option(socket.IPPROTO_TCP, socket.TCP_NODELAY),
)
_TRANSPARENT_OPTIONS = (
    _option(socket.IPPROTO_IP, _IP_TRANSPARENT),
    _option(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT),
    _option(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT),
)

_ALWAYS: Rules = {
    # Clients; backends; pairs for workers and their channels to keyd.
    "accept4": _ANYHOW,
    "socket": _SOCKETS,
    "socketpair": ((Only(0, _ALL, socket.AF_UNIX), Only(1, _TYPE, socket.SOCK_SEQPACKET)),),
    "connect": _ANYHOW,
    "getsockname": _ANYHOW,
    # As Python writes a socket as text, which it does whenever it finds one that was not closed.
    "getpeername": _ANYHOW,
    "getsockopt": _QUESTIONS,
    "setsockopt": _OPTIONS,
    "shutdown": _ANYHOW,
    "sendto": _ANYHOW,
    "sendmsg": _ANYHOW,
    "recvfrom": _ANYHOW,
    "recvmsg": _ANYHOW,
    # Non-blocking.
    "ioctl": ((Only(1, _ALL, _FIONBIO),),),
    "close": _ANYHOW,
    # The loop.
    "epoll_ctl": _ANYHOW,
    "epoll_wait": _ANYHOW,
    "epoll_pwait": _ANYHOW,
    "poll": _ANYHOW,
    "ppoll": _ANYHOW,
    # Workers' reports, and the end of each worker, and of the fork server.
    "memfd_create": _ANYHOW,
    "ftruncate": _ANYHOW,
    "fcntl": ((Only(1, _ALL, _F_ADD_SEALS),), (Only(1, _ALL, _F_GET_SEALS),)),
    # fstat(2), as some versions of glibc make it.
    "fstat": _ANYHOW,
    "newfstatat": ((Only(3, _AT_EMPTY_PATH, _AT_EMPTY_PATH),),),
    "pread64": _ANYHOW,
    "pidfd_send_signal": ((Only(1, _ALL, signal.SIGKILL),),),
    "waitid": _ANYHOW,
    "wait4": _ANYHOW,
    # Standard error, for what nobody has foreseen.
    "write": _ANYHOW,
    # Memory of its own, none of it executable.
    "brk": _ANYHOW,
    "mmap": ((NOT_EXECUTABLE, *OWN_MEMORY),),
    "mprotect": ((NOT_EXECUTABLE,),),
    "mremap": _ANYHOW,
    "munmap": _ANYHOW,
    "madvise": _ANYHOW,
    # Time, locks, signals, the end.
    "clock_gettime": _ANYHOW,
    "futex": LOCK,
    "restart_syscall": _ANYHOW,
    "rt_sigreturn": _ANYHOW,
    "rt_sigprocmask": _ANYHOW,
    "rt_sigaction": _ANYHOW,
    "exit_group": _ANYHOW,
}

#: What Python tries on its way to a traceback: it looks for the source. These fail, so that the
#: reason of an end that nobody has foreseen gets to the log, though without the lines of the code.
FAILING: Rules = {
    "openat": _ANYHOW,
    "newfstatat": ((Only(3, _AT_EMPTY_PATH, 0),),),
    "readlink": _ANYHOW,
    "readlinkat": _ANYHOW,
    # Python 3.13 asks whether standard error is a terminal, for colours.
    "ioctl": ((Only(1, _ALL, termios.TCGETS),),),
}


def parent_calls(
    to_unix_sockets: bool, from_clients_addresses: bool, from_unix_clients: bool = False
) -> Rules:
    """What a parent may call, which only connects to unix sockets, or binds, where it has to."""
    calls = dict(_ALWAYS)
    options = [*_OPTIONS]
    if to_unix_sockets:
        calls["socket"] = (*_SOCKETS, _stream(socket.AF_UNIX))
        options.append(_option(socket.SOL_SOCKET, SO_PASSRIGHTS))
    if from_unix_clients:
        # Which user has connected.
        calls["getsockopt"] = (*_QUESTIONS, _option(socket.SOL_SOCKET, socket.SO_PEERCRED))
    if to_unix_sockets or from_unix_clients:
        # Closing without a wait (``between.closing``).
        calls["setitimer"] = ((Only(0, _ALL, _ITIMER_REAL),),)
    if from_clients_addresses:
        calls["bind"] = _ANYHOW
        options += _TRANSPARENT_OPTIONS
    return {**calls, "setsockopt": tuple(options)}
