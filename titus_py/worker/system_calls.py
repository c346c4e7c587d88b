"""The system calls that a worker may make: two lists, the second within the first.

Data for the supervisor, which has the filters built.
Nothing here opens, creates, connects or binds anything, starts or touches another
process, or makes memory executable. A call that is not listed kills the worker.
"""

import mmap
import socket

from keyd.linux.seccomp import SET_MODE_FILTER, Only, Rules
from titus_py.worker.farewell import SIOCINQ, SIOCOUTQ

__all__ = ["ESTABLISHED", "HANDSHAKE"]

_ANYHOW: tuple[tuple[Only, ...], ...] = ((),)
_ALL = 0xFFFF_FFFF
_FIONBIO = 0x5421

_ALL_64 = 0xFFFF_FFFF_FFFF_FFFF
_MSG_FASTOPEN = 0x2000_0000

_NOT_EXECUTABLE = ((Only(2, mmap.PROT_EXEC, 0),),)
#: sendto(2) used as send(2): to the connected peer only. With an address and MSG_FASTOPEN it
#: is a connect(2), on a socket that belongs to the host's network. For that, the backend would
#: only have to reset the connection.
_TO_ITS_PEER = ((Only(3, _MSG_FASTOPEN, 0), Only(4, _ALL_64, 0), Only(5, _ALL_64, 0)),)


def _option(level: int, option: int) -> tuple[Only, ...]:
    return Only(1, _ALL, level), Only(2, _ALL, option)


#: After the handshake: for receiving the backend's socket, and then for the pump.
ESTABLISHED: Rules = {
    # For the client (by OpenSSL), and for what the C library writes to standard error.
    "read": _ANYHOW,
    "write": _ANYHOW,
    # For the backend, the parent and keyd; recvmsg brings the backend's socket. sendmsg is not
    # allowed: it can have an address, too, where no filter sees it, and it can send descriptors.
    # A socket with SO_LINGER set makes its last closer wait: that would be the parent, or keyd.
    "recvfrom": _ANYHOW,
    "sendto": _TO_ITS_PEER,
    # Without MSG_PEEK: what is on its way from the parent (``hand_over``) is the parent's until
    # the worker has taken it.
    "recvmsg": ((Only(2, socket.MSG_PEEK, 0),),),
    "poll": _ANYHOW,
    "ppoll": _ANYHOW,
    "shutdown": _ANYHOW,
    "close": _ANYHOW,
    # Python asks a received socket what it is.
    "getsockname": _ANYHOW,
    "getsockopt": _ANYHOW,
    "setsockopt": (_option(socket.SOL_SOCKET, socket.SO_LINGER),),
    # At the end: whether all has been acknowledged, how much is still to be read (``farewell``).
    "ioctl": ((Only(1, _ALL, SIOCOUTQ),), (Only(1, _ALL, SIOCINQ),)),
    # Memory, none of it executable.
    "brk": _ANYHOW,
    "mmap": _NOT_EXECUTABLE,
    "mprotect": _NOT_EXECUTABLE,
    "mremap": _ANYHOW,
    "munmap": _ANYHOW,
    "madvise": _ANYHOW,
    # OpenSSL asks whether it has been forked, and for fresh entropy.
    "getpid": _ANYHOW,
    "getrandom": _ANYHOW,
    # Needed where the vDSO does not do it.
    "clock_gettime": _ANYHOW,
    "futex": _ANYHOW,
    "restart_syscall": _ANYHOW,
    "rt_sigreturn": _ANYHOW,
    "exit_group": _ANYHOW,
}

#: During the handshake: the same, and what only the handshake needs.
HANDSHAKE: Rules = {
    **ESTABLISHED,
    # The client's socket is made non-blocking.
    "ioctl": (*ESTABLISHED["ioctl"], (Only(1, _ALL, _FIONBIO),)),
    # The client's last message is acknowledged at once.
    "setsockopt": (
        *ESTABLISHED["setsockopt"],
        _option(socket.IPPROTO_TCP, socket.TCP_QUICKACK),
    ),
    # For putting the second filter on. A filter can only take calls away.
    "seccomp": ((Only(0, _ALL, SET_MODE_FILTER), Only(1, _ALL_64, 0)),),
}
