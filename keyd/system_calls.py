"""The system calls that keyd may make once it serves, ``keyd make``, and checkers of files.

Data for their filters. No file is opened, no socket made, no program started, no memory made
executable. The process with a token's module is different: what a vendor's module calls, nobody
knows. Its filter names what no module needs.
"""

import mmap
import socket

from keyd.linux.seccomp import Only, Rules
from keyd.linux.unix_socket import SO_PASSRIGHTS

__all__ = [
    "ASKING_TOKENS",
    "CONNECTING",
    "MAKING",
    "MEMORY",
    "NOT_FOR_MODULES",
    "PARSING",
    "SERVING",
    "unknown_to_modules",
]

_ANYHOW: tuple[tuple[Only, ...], ...] = ((),)
_NOT_EXECUTABLE = ((Only(2, mmap.PROT_EXEC, 0),),)

#: Memory, none of it executable: a part of other rules.
MEMORY: Rules = {
    "brk": _ANYHOW,
    "mmap": _NOT_EXECUTABLE,
    "mprotect": _NOT_EXECUTABLE,
    "mremap": _ANYHOW,
    "munmap": _ANYHOW,
    "madvise": _ANYHOW,
}

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
    **MEMORY,
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
    **MEMORY,
    # OpenSSL: to see whether it was forked, and for fresh entropy.
    "getpid": _ANYHOW,
    "getrandom": _ANYHOW,
    # Locks, and the end.
    "futex": _ANYHOW,
    "rt_sigreturn": _ANYHOW,
    "rt_sigprocmask": _ANYHOW,
    "exit_group": _ANYHOW,
}

#: What ``keyd check`` may do besides, where it has tokens prove their keys.
ASKING_TOKENS: Rules = {
    "poll": _ANYHOW,
    "ppoll": _ANYHOW,
    "recvfrom": _ANYHOW,
    "sendto": _ANYHOW,
}

#: The process that connects to upstreams: to unix sockets, and to nothing else.
CONNECTING: Rules = {
    "socket": ((Only(0, 0xFFFF_FFFF, socket.AF_UNIX),),),
    "setsockopt": ((Only(1, 0xFFFF_FFFF, socket.SOL_SOCKET), Only(2, 0xFFFF_FFFF, SO_PASSRIGHTS)),),
    "connect": _ANYHOW,
    # keyd: connections, and what became of them.
    "sendmsg": _ANYHOW,
    "sendto": _ANYHOW,
    "recvfrom": _ANYHOW,
    "poll": _ANYHOW,
    "ppoll": _ANYHOW,
    "close": _ANYHOW,
    **MEMORY,
    # Locks, time, and the end.
    "futex": _ANYHOW,
    "clock_gettime": _ANYHOW,
    "restart_syscall": _ANYHOW,
    "rt_sigreturn": _ANYHOW,
    "exit_group": _ANYHOW,
}

_CLONE_THREAD = 0x0001_0000

#: A module that makes one of these calls is killed: it is not what its vendor wrote.
NOT_FOR_MODULES: Rules = dict.fromkeys(
    (
        # Other programs, and processes: it may have threads (clone3 below).
        *("execve", "execveat", "fork", "vfork"),
        # Other processes' memory and descriptors.
        *("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp"),
        *("process_madvise", "perf_event_open"),
        # Another view of the file system, and other namespaces.
        *("mount", "umount2", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick"),
        *("pivot_root", "chroot", "setns", "unshare", "open_by_handle_at", "fanotify_init"),
        # The kernel's large interfaces, where holes have been.
        *("bpf", "io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd"),
        *("add_key", "request_key", "keyctl", "modify_ldt", "vmsplice"),
        # The machine.
        *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load"),
        *("reboot", "swapon", "swapoff", "acct", "quotactl", "syslog", "iopl", "ioperm"),
        *("settimeofday", "clock_settime", "adjtimex", "clock_adjtime", "sethostname"),
        *("setdomainname", "personality", "lookup_dcookie", "nfsservctl", "vhangup"),
    ),
    _ANYHOW,
) | {"clone": ((Only(0, _CLONE_THREAD, 0),),)}
#: These are of a network namespace, or of the file system.
_KEPT_IN = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
#: Others are the machine's: vsock(7), for one, leads from any namespace to a virtual machine's
#: host.
_MOST_FAMILIES = 64
#: A pid that is not 0, the caller's own: one of its bits is set. Landlock keeps no process from the
#: limits of another that has the same uid, as another token's has.
_OF_OTHERS = tuple((Only(0, 1 << bit, 1 << bit),) for bit in range(32))


def unknown_to_modules(network: bool) -> Rules:
    """Calls that fail, as if the kernel did not know them; fewer with a network."""
    calls: Rules = {
        # Its flags are in memory, where a filter cannot see them. libc then takes clone(2) for
        # threads.
        "clone3": _ANYHOW,
        "prlimit64": _OF_OTHERS,
    }
    if network:
        return calls
    others = [family for family in range(_MOST_FAMILIES) if family not in _KEPT_IN]
    return {**calls, "socket": tuple((Only(0, 0xFFFF_FFFF, family),) for family in others)}


#: Any other call fails: what the library or Python tries and can do without ends nobody.
PARSING: Rules = {
    # The standard streams: nothing else is open.
    "read": _ANYHOW,
    "write": _ANYHOW,
    "close": _ANYHOW,
    **MEMORY,
    # OpenSSL: to see whether it was forked, and for fresh entropy.
    "getpid": _ANYHOW,
    "getrandom": _ANYHOW,
    # Locks, time, signals, the end.
    "futex": _ANYHOW,
    "clock_gettime": _ANYHOW,
    "restart_syscall": _ANYHOW,
    "rt_sigreturn": _ANYHOW,
    "rt_sigprocmask": _ANYHOW,
    "rt_sigaction": _ANYHOW,
    "exit_group": _ANYHOW,
}
