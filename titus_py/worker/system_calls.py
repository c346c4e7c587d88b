"""The system calls that a worker may make, from before it runs any Python to its end.

Data for the supervisor, which has the filter built.
Nothing here opens, creates, connects or binds anything, starts or touches another
process, makes memory executable, or brings another filter: seccomp(2) would let an attacker have
programs of their own compiled in the kernel. A call that is not listed kills the worker.
"""

import mmap
import socket

from keyd.linux.seccomp import Only, Rules
from titus_py.worker.farewell import SIOCINQ, SIOCOUTQ

__all__ = ["LOCK", "NOT_EXECUTABLE", "OWN_MEMORY", "WORKER"]

_ANYHOW: tuple[tuple[Only, ...], ...] = ((),)
_ALL = 0xFFFF_FFFF
_ALL_64 = 0xFFFF_FFFF_FFFF_FFFF

NOT_EXECUTABLE = Only(2, mmap.PROT_EXEC, 0)
#: Memory of its own alone, as the C library and Python ask for it: MAP_PRIVATE and MAP_ANONYMOUS,
#: and of all else at most MAP_FIXED, MAP_NORESERVE and MAP_STACK. No file's, no socket's.
_MAP_OWN = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_MAP_MAY = 0x10 | 0x4000 | 0x2_0000
OWN_MEMORY = (Only(3, _ALL & ~_MAP_MAY, _MAP_OWN), Only(4, _ALL, _ALL))
#: How malloc gives memory back (MADV_DONTNEED).
_GIVE_BACK = (Only(2, _ALL, 4),)
#: The futex(2) operations of locks: FUTEX_WAIT, _WAKE, _WAIT_BITSET, _WAKE_BITSET; each may be
#: private to the process and by either clock.
_FUTEX_OPTIONS = 128 | 256
LOCK = tuple((Only(1, _ALL & ~_FUTEX_OPTIONS, operation),) for operation in (0, 1, 9, 10))
#: Receiving what comes next, or looking at it. No error queue, no out-of-band octets, no memory of
#: devices.
_PLAIN_RECEIVE = (Only(3, _ALL & ~(socket.MSG_PEEK | socket.MSG_DONTWAIT), 0),)
_WITH_DESCRIPTORS = (Only(2, _ALL & ~(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT), 0),)
#: No urgent octets, for which the kernel has code of its own, also in unix sockets.
_SEND_MAY = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL | socket.MSG_MORE
_PLAIN_SEND = Only(3, _ALL & ~_SEND_MAY, 0)
#: sendto(2) used as send(2): to the connected peer only. With an address and MSG_FASTOPEN it
#: is a connect(2), on a socket that belongs to the host's network. For that, the backend would
#: only have to reset the connection.
_TO_ITS_PEER = ((_PLAIN_SEND, Only(4, _ALL_64, 0), Only(5, _ALL_64, 0)),)


def _option(level: int, option: int) -> tuple[Only, ...]:
    return Only(1, _ALL, level), Only(2, _ALL, option)


WORKER: Rules = {
    # For the client (by OpenSSL), and for what the C library writes to standard error.
    "read": _ANYHOW,
    "write": _ANYHOW,
    # For the backend, the parent and keyd; recvmsg brings the backend's socket. sendmsg is not
    # allowed: it can have an address, too, where no filter sees it, and it can send descriptors.
    # A socket with SO_LINGER set makes its last closer wait: that would be the parent, or keyd.
    "recvfrom": (_PLAIN_RECEIVE,),
    "sendto": _TO_ITS_PEER,
    # Without MSG_PEEK: what is on its way from the parent (``hand_over``) is the parent's until
    # the worker has taken it.
    "recvmsg": (_WITH_DESCRIPTORS,),
    "poll": _ANYHOW,
    "ppoll": _ANYHOW,
    "shutdown": _ANYHOW,
    "close": _ANYHOW,
    # Python asks a received socket for its family; the pump asks why the client's has ended.
    "getsockname": _ANYHOW,
    "getsockopt": (_option(socket.SOL_SOCKET, socket.SO_ERROR),),
    "setsockopt": (
        _option(socket.SOL_SOCKET, socket.SO_LINGER),
        # The client's last message of the handshake is acknowledged at once.
        _option(socket.IPPROTO_TCP, socket.TCP_QUICKACK),
    ),
    # At the end: whether all has been acknowledged, how much is still to be read (``farewell``).
    "ioctl": ((Only(1, _ALL, SIOCOUTQ),), (Only(1, _ALL, SIOCINQ),)),
    # Memory, none of it executable.
    "brk": _ANYHOW,
    "mmap": ((NOT_EXECUTABLE, *OWN_MEMORY),),
    "mprotect": ((NOT_EXECUTABLE,),),
    "mremap": _ANYHOW,
    "munmap": _ANYHOW,
    "madvise": (_GIVE_BACK,),
    # OpenSSL asks whether it has been forked, and for fresh entropy.
    "getpid": _ANYHOW,
    "getrandom": _ANYHOW,
    # Needed where the vDSO does not do it.
    "clock_gettime": _ANYHOW,
    "futex": LOCK,
    "restart_syscall": _ANYHOW,
    "rt_sigreturn": _ANYHOW,
    "exit_group": _ANYHOW,
}
