"""What code that has taken over a worker would try, and what stops it: the table of attempts.

Each attempt is a function that goes straight to the kernel (syscall(2) by ctypes: no check in
Python plays a part), run within the real worker by ``infected_fork_server``, and, as its control,
by an unconfined child of the tests. It returns when it got what it wanted, and raises OSError
with the kernel's reason otherwise. ``ATTEMPTS``, at the end, says what is to stop each: first
in the worker as it is, then with parts of its confinement left out, so that the parts behind
are seen to hold as well. x86-64 only, for its system calls' numbers.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

__all__ = ["ATTEMPTS", "Attempt", "Place", "outcome"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_NUMBERS = {
    "open": 2, "stat": 4, "mmap": 9, "mprotect": 10, "munmap": 11, "ioctl": 16, "mremap": 25,
    "madvise": 28, "shmget": 29, "shmat": 30, "dup": 32, "getpid": 39, "socket": 41, "connect": 42,
    "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "bind": 49, "listen": 50,
    "socketpair": 53, "setsockopt": 54, "getsockopt": 55, "clone": 56, "fork": 57, "execve": 59,
    "wait4": 61, "kill": 62, "msgget": 68, "fcntl": 72, "ftruncate": 77, "chdir": 80, "mkdir": 83,
    "unlink": 87, "ptrace": 101, "setuid": 105, "setgid": 106, "setgroups": 116, "setresuid": 117,
    "capset": 126, "rt_sigqueueinfo": 129, "personality": 135, "mlock": 149, "prctl": 157,
    "setrlimit": 160, "chroot": 161, "mount": 165, "futex": 202, "timer_create": 222, "tgkill":
    234, "mq_open": 240, "add_key": 248, "keyctl": 250, "inotify_init": 253, "openat": 257,
    "unshare": 272, "eventfd2": 290, "epoll_create1": 291, "pipe2": 293, "perf_event_open": 298,
    "recvmmsg": 299, "name_to_handle_at": 303, "open_by_handle_at": 304, "setns": 308,
    "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "seccomp": 317, "getrandom":
    318, "memfd_create": 319, "bpf": 321, "execveat": 322, "userfaultfd": 323, "pkey_mprotect":
    329, "pidfd_send_signal": 424, "io_uring_setup": 425, "open_tree": 428, "fsopen": 430,
    "pidfd_open": 434, "clone3": 435, "openat2": 437, "pidfd_getfd": 438,
}  # fmt: skip

_AT_FDCWD = -100
PAGE = mmap.PAGESIZE


class Place(NamedTuple):
    """Where the code runs: what it holds, as descriptors (-1: nothing), and its report."""

    parent: int = -1
    keyd: int = -1
    client: int = -1
    backend: int = -1
    #: The address of its page.
    report: int = 0


def call(name: str, *arguments: object) -> int:
    """The system call; raises OSError."""
    words = [
        ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments
    ]
    result: int = _libc.syscall(ctypes.c_long(_NUMBERS[name]), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def outcome(code: "Code", place: Place, parameters: list[int]) -> str:
    """How an attempt went: ``done``, or the kernel's reason."""
    try:
        code(place, *parameters)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except MemoryError:
        return "MemoryError"
    return "done"


def _stub(code: bytes) -> "Callable[[], int]":
    """Machine code to call, made before the confinement: what an attacker finds in libc."""
    page = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    call("mprotect", address, PAGE, mmap.PROT_READ | mmap.PROT_EXEC)
    function = ctypes.CFUNCTYPE(ctypes.c_long)(address)
    function.page = page  # type: ignore[attr-defined]
    return function


#: mov eax, 20 (getpid, as 32-bit programs call it); int 0x80; ret
_int80 = _stub(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
#: mov eax, 58 (vfork); syscall; test eax, eax; jnz +9; xor edi, edi; mov eax, 60; syscall; ret
_vfork = _stub(
    b"\xb8\x3a\x00\x00\x00\x0f\x05\x85\xc0\x75\x09\x31\xff\xb8\x3c\x00\x00\x00\x0f\x05\xc3"
)


# --- files --------------------------------------------------------------------------------


def read_file(place: Place) -> None:
    descriptor = call("openat", _AT_FDCWD, b"/etc/passwd", os.O_RDONLY)
    assert os.read(descriptor, 4)
    os.close(descriptor)


def read_file_open(place: Place) -> None:
    os.close(call("open", b"/etc/passwd", os.O_RDONLY))


def read_file_openat2(place: Place) -> None:
    os.close(call("openat2", _AT_FDCWD, b"/etc/passwd", struct.pack("3Q", 0, 0, 0), 24))


def list_root(place: Place) -> None:
    os.close(call("openat", _AT_FDCWD, b"/", os.O_RDONLY | os.O_DIRECTORY))


def look_at_root(place: Place) -> None:
    call("stat", b"/", ctypes.create_string_buffer(256))


def create_file(place: Place) -> None:
    os.close(call("openat", _AT_FDCWD, b"attack", os.O_WRONLY | os.O_CREAT, 0o600))
    call("unlink", b"attack")


def create_directory(place: Place) -> None:
    call("mkdir", b"attack", 0o700)
    os.rmdir("attack")


def read_proc(place: Place) -> None:
    os.close(call("openat", _AT_FDCWD, b"/proc/self/maps", os.O_RDONLY))


def proc_memory(place: Place, pid: int) -> None:
    os.close(call("openat", _AT_FDCWD, b"/proc/%d/mem" % pid, os.O_RDONLY))


def file_by_handle(place: Place) -> None:
    """What broke out of containers once ("shocker"): a file by its handle, from any directory."""
    handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 256)
    mount = ctypes.c_int()
    root = call("openat", _AT_FDCWD, b"/", os.O_RDONLY | os.O_DIRECTORY)
    call("name_to_handle_at", root, b"etc/passwd", handle, ctypes.byref(mount), 0)
    os.close(call("open_by_handle_at", root, handle, os.O_RDONLY))
    os.close(root)


def handle_alone(place: Place) -> None:
    handle = ctypes.create_string_buffer(struct.pack("Ii", 8, 1), 256)
    try:
        call("open_by_handle_at", _AT_FDCWD, handle, os.O_RDONLY)
    except OSError as error:
        if error.errno != errno.ESTALE:  # let in, and asked for a file that there is not
            raise


# --- out of the chroot --------------------------------------------------------------------


def chroot_twice(place: Place) -> None:
    """The classic: chroot further in while standing outside, then walk up."""
    call("chroot", b".")
    for _ in range(64):
        call("chdir", b"..")


def mount_proc(place: Place) -> None:
    call("unshare", 0x0002_0000)  # CLONE_NEWNS: not on the host
    call("mount", b"none", b"/", None, (1 << 18) | (1 << 14), None)  # MS_PRIVATE, MS_REC
    call("mount", b"proc", b".", b"proc", 0, None)


def fsopen_proc(place: Place) -> None:
    os.close(call("fsopen", b"proc", 0))


def clone_mount(place: Place) -> None:
    os.close(call("open_tree", _AT_FDCWD, b"/", 1))  # OPEN_TREE_CLONE


def user_namespace(place: Place) -> None:
    """Root of a user namespace of one's own: all capabilities, in there."""
    call("unshare", 0x1000_0000)


# --- other processes ----------------------------------------------------------------------


def trace(place: Place, pid: int) -> None:
    call("ptrace", 0x4206, pid, 0, 0)  # PTRACE_SEIZE: does not stop it
    call("ptrace", 0x4207, pid, 0, 0)  # PTRACE_INTERRUPT
    call("wait4", pid, None, 0x4000_0000, None)  # __WALL
    call("ptrace", 17, pid, 0, 0)  # PTRACE_DETACH


def read_memory(place: Place, pid: int, address: int) -> None:
    buffer = ctypes.create_string_buffer(16)
    here = struct.pack("QQ", ctypes.addressof(buffer), 16)
    there = struct.pack("QQ", address, 16)
    assert call("process_vm_readv", pid, here, 1, there, 1, 0) == 16


def write_memory(place: Place, pid: int, address: int) -> None:
    """An octet; where it can be read, the one that is there already."""
    buffer = ctypes.create_string_buffer(1)
    here = struct.pack("QQ", ctypes.addressof(buffer), 1)
    there = struct.pack("QQ", address, 1)
    with contextlib.suppress(OSError):
        call("process_vm_readv", pid, here, 1, there, 1, 0)
    call("process_vm_writev", pid, here, 1, there, 1, 0)


def compare_process(place: Place, pid: int) -> None:
    call("kcmp", pid, pid, 1, 0, 0)


def take_descriptor(place: Place, pid: int) -> None:
    pidfd = call("pidfd_open", pid, 0)
    os.close(call("pidfd_getfd", pidfd, 0, 0))
    os.close(pidfd)


def send_signal(place: Place, pid: int) -> None:
    call("kill", pid, 0)


def send_thread_signal(place: Place, pid: int) -> None:
    call("tgkill", pid, pid, 0)


def queue_signal(place: Place, pid: int) -> None:
    info = struct.pack("iiii", signal.SIGWINCH, 0, -1, 0) + bytes(112)  # ignored by default
    call("rt_sigqueueinfo", pid, signal.SIGWINCH, info)


def kill_everyone(place: Place) -> None:
    call("kill", -1, 0)


def signal_peer(place: Place) -> None:
    """Linux 6.5 gives a pidfd for whoever made the other end of a unix socket."""
    pidfd, size = ctypes.c_int(-1), ctypes.c_uint(4)
    peer = place.parent
    call("getsockopt", peer, socket.SOL_SOCKET, 77, ctypes.byref(pidfd), ctypes.byref(size))
    call("pidfd_send_signal", pidfd.value, 0, None, 0)


def signal_by_descriptor(place: Place, pid: int) -> None:
    call("fcntl", place.parent, 8, pid)  # F_SETOWN: SIGIO to this one, whenever it is readable
    owner = call("fcntl", place.parent, 9)
    assert owner == pid


# --- the network --------------------------------------------------------------------------


def _connect(family: int, address: bytes) -> None:
    descriptor = call("socket", family, socket.SOCK_STREAM, 0)
    try:
        call("connect", descriptor, address, len(address))
    finally:
        os.close(descriptor)


def _inet(port: int) -> bytes:
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", port, b"\x7f\0\0\1")


def connect_inet(place: Place, port: int) -> None:
    _connect(socket.AF_INET, _inet(port))


def connect_inet6(place: Place, port: int) -> None:
    address = struct.pack("!HI16sI", port, 0, bytes(10) + b"\xff\xff\x7f\0\0\1", 0)
    _connect(socket.AF_INET6, struct.pack("=H", socket.AF_INET6) + address)


def send_datagram(place: Place, port: int) -> None:
    descriptor = call("socket", socket.AF_INET, socket.SOCK_DGRAM, 0)
    address = _inet(port)
    try:
        call("sendto", descriptor, b"x", 1, 0, address, len(address))
    finally:
        os.close(descriptor)


def connect_unix(place: Place, number: int) -> None:
    """To an abstract name, which no chroot hides."""
    name = b"\0titus-py-attack-%d" % number
    _connect(socket.AF_UNIX, struct.pack("=H", socket.AF_UNIX) + name)


def unix_socket(place: Place) -> None:
    os.close(call("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0))


def netlink_socket(place: Place) -> None:
    os.close(call("socket", socket.AF_NETLINK, socket.SOCK_RAW, 0))


def packet_socket(place: Place) -> None:
    os.close(call("socket", socket.AF_PACKET, socket.SOCK_RAW, 0))


def socket_pair(place: Place) -> None:
    pair = (ctypes.c_int * 2)()
    call("socketpair", socket.AF_UNIX, socket.SOCK_STREAM, 0, pair)
    os.close(pair[0])
    os.close(pair[1])


def serve_clients(place: Place) -> None:
    descriptor = call("socket", socket.AF_INET, socket.SOCK_STREAM, 0)
    address = _inet(0)
    try:
        call("bind", descriptor, address, len(address))
        call("listen", descriptor, 1)
    finally:
        os.close(descriptor)


def listen_on_client(place: Place) -> None:
    """The client's socket, made a listening one."""
    address = struct.pack("=H", socket.AF_UNSPEC) + bytes(14)
    call("connect", place.client, address, len(address))
    call("listen", place.client, 1)


def reconnect_client(place: Place, port: int) -> None:
    """The client's socket belongs to the host's network: disconnect it, connect it anew."""
    address = struct.pack("=H", socket.AF_UNSPEC) + bytes(14)
    call("connect", place.client, address, len(address))
    elsewhere = _inet(port)
    try:
        call("connect", place.client, elsewhere, len(elsewhere))
    except OSError as error:
        if error.errno != errno.EINPROGRESS:
            raise


def send_elsewhere(place: Place, port: int) -> None:
    """sendto(2) with MSG_FASTOPEN is a connect(2): on the backend's socket, once it was reset.

    The kernel takes a non-blocking connect for unfinished until somebody asks it again.
    """
    call("sendto", place.backend, b"reset", 5, 0, None, 0)
    poll = select.poll()
    poll.register(place.backend, 0)
    assert poll.poll(5000)
    address = _inet(port)
    for _ in range(3):
        try:
            call("sendto", place.backend, b"x", 1, 0x2000_0000, address, len(address))
        except OSError as error:
            # The first discards the old connection, the second one begins the new.
            if error.errno not in (errno.ECONNRESET, errno.ECONNABORTED, errno.EINPROGRESS):
                raise
            time.sleep(0.05)
        else:
            return
    raise OSError(errno.ENOTCONN, "sendto")


def keep_alive(place: Place) -> None:
    """An option that our code has no use for."""
    call("setsockopt", place.client, socket.SOL_SOCKET, socket.SO_KEEPALIVE, _TRUE, len(_TRUE))


def make_transparent(place: Place) -> None:
    """IP_TRANSPARENT: such a socket can have any machine's address."""
    call("setsockopt", place.client, socket.IPPROTO_IP, 19, _TRUE, len(_TRUE))


def ask_more(place: Place) -> None:
    """FIONREAD's neighbour: whether out-of-band octets are next (SIOCATMARK)."""
    call("ioctl", place.client, 0x8905, ctypes.create_string_buffer(4))


def _ask_option(descriptor: int, level: int, option: int) -> None:
    value, size = ctypes.create_string_buffer(256), ctypes.c_uint(256)
    call("getsockopt", descriptor, level, option, value, ctypes.byref(size))


def ask_who(place: Place) -> None:
    """SO_PEERCRED."""
    _ask_option(place.parent, socket.SOL_SOCKET, socket.SO_PEERCRED)


def ask_congestion(place: Place) -> None:
    """TCP_CC_INFO, of a module's own making."""
    _ask_option(place.client, socket.IPPROTO_TCP, 26)


def read_errors(place: Place) -> None:
    """MSG_ERRQUEUE, which is empty."""
    flags = socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT
    try:
        call("recvfrom", place.client, ctypes.create_string_buffer(1), 1, flags, 0, 0)
    except BlockingIOError:
        return


def read_urgent(place: Place) -> None:
    """MSG_OOB, of which there is nothing."""
    flags = socket.MSG_OOB | socket.MSG_DONTWAIT
    with contextlib.suppress(OSError):
        call("recvfrom", place.client, ctypes.create_string_buffer(1), 1, flags, 0, 0)


def send_urgent(place: Place) -> None:
    """MSG_OOB: on a unix socket, too, which has code of its own for it in the kernel."""
    flags = socket.MSG_OOB | socket.MSG_DONTWAIT
    call("sendto", place.client, b"!", 1, flags, None, 0)


def keyd_later(place: Place) -> None:
    """The channel to keyd, which the provider still knows by its number."""
    os.write(place.keyd, b"x")


def pass_descriptors(place: Place) -> None:
    """To the parent, which would hold it, or wait in closing it (SO_LINGER)."""
    data = ctypes.create_string_buffer(b"D\0\0\xff", 4)  # a request that is in order
    control = struct.pack("QiiiI", 20, socket.SOL_SOCKET, 1, place.client, 0)
    held = ctypes.create_string_buffer(control)
    vector = struct.pack("QQ", ctypes.addressof(data), 4)
    vectors = ctypes.create_string_buffer(vector)
    header = struct.pack(
        "QIxxxxQQQQixxxx", 0, 0, ctypes.addressof(vectors), 1, ctypes.addressof(held), 24, 0
    )
    call("sendmsg", place.parent, header, 0)


def pass_descriptors_to_keyd(place: Place) -> None:
    pass_descriptors(place._replace(parent=place.keyd))


class _Receiver:
    """A struct msghdr, with room for what may come: a few octets and a descriptor."""

    def __init__(self) -> None:
        self._data = ctypes.create_string_buffer(512)
        self.control = ctypes.create_string_buffer(24)
        vector = struct.pack("QQ", ctypes.addressof(self._data), 512)
        self._vectors = ctypes.create_string_buffer(vector, len(vector))
        vectors, control = ctypes.addressof(self._vectors), ctypes.addressof(self.control)
        header = struct.pack("QIxxxxQQQQixxxx", 0, 0, vectors, 1, control, 24, 0)
        # A struct mmsghdr goes on with how much has come.
        self.header = ctypes.create_string_buffer(header + bytes(8), len(header) + 8)

    def descriptor(self) -> int:
        length, *_, descriptor = struct.unpack("QiiiI", self.control)
        assert length == 20
        return int(descriptor)


_TRUE = struct.pack("=i", 1)
_LOOK = socket.MSG_PEEK | socket.MSG_DONTWAIT


def look_ahead(place: Place) -> None:
    """A copy of a descriptor that is still on its way, and that the parent may yet close last."""
    receiver = _Receiver()
    call("recvmsg", place.parent, receiver.header, _LOOK)
    os.close(receiver.descriptor())


def look_ahead_at_many(place: Place) -> None:
    receiver = _Receiver()
    call("recvmmsg", place.parent, receiver.header, 1, _LOOK, None)
    os.close(receiver.descriptor())


def speak_for_another(place: Place) -> None:
    """On any socket but its own: the fork server's, whose word the parent takes for its own."""
    forked = b"P" + bytes(12)
    for descriptor in set(range(64)) - set(place[:4]):
        with contextlib.suppress(OSError):
            call("sendto", descriptor, forked, len(forked), socket.MSG_DONTWAIT, None, 0)
            return
    raise OSError(errno.EBADF, "sendto")


# --- new processes, other programs --------------------------------------------------------


def _child(pid: int) -> None:
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0x4000_0000)


def fork(place: Place) -> None:
    _child(call("fork"))


def vfork(place: Place) -> None:
    pid = _vfork()
    if pid < 0:
        raise OSError(-pid, "vfork")
    os.waitpid(pid, 0)


def clone(place: Place) -> None:
    _child(call("clone", signal.SIGCHLD, 0, 0, 0, 0))


def clone3(place: Place) -> None:
    _child(call("clone3", struct.pack("8Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0), 64))


def new_pid_namespace(place: Place) -> None:
    _child(call("clone", signal.SIGCHLD | 0x2000_0000, 0, 0, 0, 0))


def outlive_parent(place: Place) -> None:
    call("prctl", 1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG


_ECHO = (ctypes.c_char_p * 4)(b"echo", b"-n", b"done", None)


def execute(place: Place) -> None:
    call("execve", b"/bin/echo", _ECHO, _ECHO)


def execute_descriptor(place: Place) -> None:
    call("execveat", _AT_FDCWD, b"/bin/echo", _ECHO, _ECHO, 0)


# --- executable memory --------------------------------------------------------------------

_RW = mmap.PROT_READ | mmap.PROT_WRITE
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def map_executable(place: Place) -> None:
    call("mmap", 0, PAGE, _RW | mmap.PROT_EXEC, _PRIVATE, -1, 0)


def make_executable(place: Place) -> None:
    page = call("mmap", 0, PAGE, _RW, _PRIVATE, -1, 0)
    call("mprotect", page, PAGE, mmap.PROT_READ | mmap.PROT_EXEC)


def make_executable_by_key(place: Place) -> None:
    page = call("mmap", 0, PAGE, _RW, _PRIVATE, -1, 0)
    call("pkey_mprotect", page, PAGE, mmap.PROT_READ | mmap.PROT_EXEC, -1)


def patch_text(place: Place) -> None:
    """Make a page of code writable, change it, make it executable again."""
    page = ctypes.cast(_int80, ctypes.c_void_p).value or 0
    call("mprotect", page, PAGE, _RW)
    ctypes.memset(page + 100, 0xC3, 1)
    call("mprotect", page, PAGE, mmap.PROT_READ | mmap.PROT_EXEC)


def move_over_text(place: Place) -> None:
    """mremap(2) is allowed: what was made data stays data, wherever it is moved to."""
    text = call("mmap", 0, 2 * PAGE, _RW, _PRIVATE, -1, 0)
    call("mmap", text + PAGE, PAGE, _RW, _PRIVATE | 0x10, -1, 0)  # MAP_FIXED
    ctypes.memset(text, 0xC3, 1)
    moved = call("mremap", text, PAGE, PAGE, 3, text + PAGE)  # MAYMOVE | FIXED
    call("mprotect", moved, PAGE, mmap.PROT_READ | mmap.PROT_EXEC)


def executable_file(place: Place) -> None:
    descriptor = call("memfd_create", b"code", 0)
    os.write(descriptor, b"\xc3" * PAGE)
    call("mmap", 0, PAGE, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, descriptor, 0)
    os.close(descriptor)


def reading_is_executing(place: Place) -> None:
    call("personality", 0x0400_0000)  # READ_IMPLIES_EXEC
    call("personality", 0)


def shared_executable(place: Place) -> None:
    segment = call("shmget", 0, PAGE, 0o1600)
    call("shmat", segment, 0, 0o100000)  # SHM_EXEC
    _libc.shmctl(segment, 0, None)


# --- uids and capabilities ----------------------------------------------------------------


def become_root(place: Place) -> None:
    call("setuid", 0)


def become_somebody(place: Place) -> None:
    call("setresuid", 12345, 12345, 12345)


def become_group(place: Place) -> None:
    call("setgid", 0)


def join_groups(place: Place) -> None:
    call("setgroups", 1, struct.pack("I", 0))


#: CAP_SYS_ADMIN, CAP_SYS_CHROOT, CAP_SETUID: some of what a fork server has or has had.
_WANTED = 1 << 21 | 1 << 18 | 1 << 7


def take_capabilities(place: Place) -> None:
    header = struct.pack("Ii", 0x2008_0522, 0)
    call("capset", header, struct.pack("6I", _WANTED, _WANTED, 0, 0, 0, 0))


def raise_ambient(place: Place) -> None:
    header = struct.pack("Ii", 0x2008_0522, 0)
    call("capset", header, struct.pack("6I", _WANTED, _WANTED, _WANTED, 0, 0, 0))
    call("prctl", 47, 2, 21, 0, 0)  # PR_CAP_AMBIENT_RAISE, CAP_SYS_ADMIN


def loosen_securebits(place: Place) -> None:
    call("prctl", 28, 0, 0, 0, 0)


def be_dumpable(place: Place) -> None:
    call("prctl", 4, 1, 0, 0, 0)


def raise_limit(place: Place) -> None:
    call("setrlimit", 7, struct.pack("QQ", 64, 64))


def join_network(place: Place, pid: int) -> None:
    pidfd = call("pidfd_open", pid, 0)
    call("setns", pidfd, 0x4000_0000)
    os.close(pidfd)


# --- the host's memory and descriptors ----------------------------------------------------


def fill_memory(place: Place) -> None:
    """A GiB, by the calls that the filter allows."""
    taken = []
    try:
        for _ in range(64):
            taken.append(call("mmap", 0, 16 << 20, _RW, _PRIVATE, -1, 0))
    finally:
        for address in taken:
            call("munmap", address, 16 << 20)


def grow_heap(place: Place) -> None:
    page = call("mmap", 0, PAGE, _RW, _PRIVATE, -1, 0)
    call("mremap", page, PAGE, 1 << 30, 1)


def lock_memory(place: Place) -> None:
    page = call("mmap", 0, 1 << 20, _RW, _PRIVATE, -1, 0)
    call("mlock", page, 1 << 20)


def map_locked(place: Place) -> None:
    call("mmap", 0, 1 << 20, _RW, _PRIVATE | 0x2000, -1, 0)  # MAP_LOCKED


def hold_descriptors(place: Place) -> None:
    taken = []
    try:
        for _ in range(100):
            taken.append(call("dup", 0))
    finally:
        for descriptor in taken:
            os.close(descriptor)


def shared_memory(place: Place) -> None:
    """System V's, which outlives its maker."""
    segment = call("shmget", 0, 1 << 20, 0o1600)
    _libc.shmctl(segment, 0, None)


def message_queue(place: Place) -> None:
    queue = call("msgget", 0, 0o1600)
    _libc.msgctl(queue, 0, None)


def queue_of_messages(place: Place) -> None:
    name = b"titus-py-attack"
    os.close(call("mq_open", name, os.O_RDWR | os.O_CREAT, 0o600, None))
    _libc.mq_unlink(b"/" + name)


def memory_file(place: Place) -> None:
    os.close(call("memfd_create", b"attack", 0))


def make_timer(place: Place) -> None:
    timer = ctypes.c_int()
    call("timer_create", 1, None, ctypes.byref(timer))


def make_inotify(place: Place) -> None:
    os.close(call("inotify_init"))


def make_epoll(place: Place) -> None:
    os.close(call("epoll_create1", 0))


def make_eventfd(place: Place) -> None:
    os.close(call("eventfd2", 0, 0))


def make_pipe(place: Place) -> None:
    pair = (ctypes.c_int * 2)()
    call("pipe2", pair, 0)
    os.close(pair[0])
    os.close(pair[1])


def grow_report(place: Place) -> None:
    """The page that the parent reads: any descriptor of it left, and no seal?"""
    reason = OSError(errno.EBADF, "ftruncate")
    for descriptor in range(64):
        try:
            call("ftruncate", descriptor, 1 << 20)
        except OSError as error:
            reason = error if error.errno != errno.EBADF else reason
        else:
            return
    raise reason


def extend_report(place: Place) -> None:
    """Beyond its page, where the file that it is of might go on."""
    moved = call("mremap", place.report, PAGE, 2 * PAGE, 1)  # MAYMOVE
    try:
        call("getrandom", moved + PAGE, 1, 0)
    finally:
        if moved != place.report:
            # Back to where the worker writes to it: FIXED, too.
            call("mremap", moved, 2 * PAGE, PAGE, 3, place.report)


def copy_report(place: Place) -> None:
    """An old size of 0 makes another mapping of what is shared: of more than there is of it."""
    copied = call("mremap", place.report, 0, 2 * PAGE, 1)
    call("getrandom", copied, 1, 0)
    call("getrandom", copied + PAGE, 1, 0)


def execute_report(place: Place) -> None:
    call("mprotect", place.report, PAGE, mmap.PROT_READ | mmap.PROT_EXEC)
    call("mprotect", place.report, PAGE, _RW)


# --- the kernel's other doors -------------------------------------------------------------


def io_uring(place: Place) -> None:
    os.close(call("io_uring_setup", 1, ctypes.create_string_buffer(120)))


def bpf(place: Place) -> None:
    os.close(call("bpf", 0, struct.pack("4I", 2, 4, 4, 1) + bytes(64), 72))  # a map


def user_faults(place: Place) -> None:
    os.close(call("userfaultfd", 0))


def perf_events(place: Place) -> None:
    attributes = struct.pack("IIQ", 1, 120, 0) + bytes(104)  # PERF_COUNT_SW_CPU_CLOCK
    os.close(call("perf_event_open", attributes, 0, -1, -1, 0))


def new_keyring(place: Place) -> None:
    call("keyctl", 1, None)  # KEYCTL_JOIN_SESSION_KEYRING


def add_key(place: Place) -> None:
    call("add_key", b"user", b"titus-py-attack", b"x", 1, -2)  # the process keyring


def terminal_input(place: Place) -> None:
    """TIOCSTI: type into the terminal that started the proxy. (FIOCLEX where it is a control.)"""
    call("ioctl", place.parent, 0x5451 if place.keyd == -2 else 0x5412, b"x")


def call_32_bit(place: Place) -> None:
    """int 0x80, whose calls have other numbers: 20 is getpid there, writev here."""
    pid = _int80()
    if pid < 0:
        raise OSError(-pid, "int 0x80")
    assert pid == os.getpid()


def call_x32(place: Place) -> None:
    result = _libc.syscall(ctypes.c_long(0x4000_0000 | _NUMBERS["getpid"]))
    if result < 0:
        raise OSError(ctypes.get_errno(), "x32 getpid")


def filter_of_its_own(place: Place) -> None:
    """One that allows all, put on top: the stricter of the two decides, still."""
    allow = struct.pack("HBBI", 6, 0, 0, 0x7FFF_0000)
    program = ctypes.create_string_buffer(allow)
    call("prctl", 38, 1, 0, 0, 0)
    call("seccomp", 1, 0, struct.pack("HxxxxxxQ", 1, ctypes.addressof(program)))


def allow_then_open(place: Place) -> None:
    """The same, without prctl(2): before the handshake is done, seccomp(2) itself is allowed."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF_0000))
    call("seccomp", 1, 0, struct.pack("HxxxxxxQ", 1, ctypes.addressof(program)))
    read_file(place)


def another_filter(place: Place) -> None:
    """A program of its own, which the kernel checks and compiles."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF_0000))
    call("seccomp", 1, 0, struct.pack("HxxxxxxQ", 1, ctypes.addressof(program)))


def notified(place: Place) -> None:
    """SECCOMP_FILTER_FLAG_NEW_LISTENER: a descriptor that no other call would give."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF_0000))
    call("seccomp", 1, 8, struct.pack("HxxxxxxQ", 1, ctypes.addressof(program)))


def not_blocking(place: Place) -> None:
    call("ioctl", place.client, 0x5421, _TRUE)


def low_water_mark(place: Place) -> None:
    call("setsockopt", place.client, socket.SOL_SOCKET, socket.SO_RCVLOWAT, _TRUE, len(_TRUE))


def lock_for_another(place: Place) -> None:
    """FUTEX_LOCK_PI, on a lock that is free."""
    call("futex", ctypes.create_string_buffer(4), 6 | 128, 0, 0)


def requeue(place: Place) -> None:
    """FUTEX_CMP_REQUEUE, with nobody there to be moved."""
    here, there = ctypes.create_string_buffer(4), ctypes.create_string_buffer(4)
    call("futex", here, 4 | 128, 1, ctypes.c_long(1), there, 0)


def advise(place: Place) -> None:
    """MADV_COLD, for pages."""
    page = call("mmap", 0, PAGE, _RW, _PRIVATE, -1, 0)
    call("madvise", page, PAGE, 20)


def share_memory(place: Place) -> None:
    call("mmap", 0, PAGE, _RW, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, -1, 0)


def map_socket(place: Place) -> None:
    """The client's, as zero-copy receiving maps it (tcp(7))."""
    call("mmap", 0, PAGE, mmap.PROT_READ, mmap.MAP_SHARED, place.client, 0)


# --- the table ----------------------------------------------------------------------------

Code = Callable[..., None]
KILLED = "killed by SIGSYS"


class Attempt(NamedTuple):
    """An attempt, and what comes of it.

    ``without`` maps parts of the confinement that are left out (as ``infected_fork_server`` names
    them) to what then becomes of the attempt: in the other parts' hands. Outcomes are
    ``done``, an errno's name, or how the worker ended.
    """

    what: str
    code: Code
    #: What the test is to hand to the code, by name.
    given: tuple[str, ...] = ()
    #: In the worker as it is.
    stopped: str = KILLED
    without: Mapping[str, str] = {}
    #: In an unconfined child, as root.
    control: str = "done"
    #: ``h``: before the handshake, ``e``: with the connection established.
    stages: str = "he"


def _in_processes(
    what: str,
    code: Code,
    *given: str,
    hidden: str = "ESRCH",
    seen: str = "EPERM",
    by_root: str = "",
) -> list[Attempt]:
    """The same on each process that there is to attack.

    They are out of sight in the worker's pid namespace, and out of reach without one; by its
    Landlock domain also where it is root, as they are.
    """
    further = {"filter namespaces become": by_root} if by_root else {}
    return [
        Attempt(
            f"{what} of {victim}",
            code,
            tuple(f"{victim} {gift}" for gift in given),
            without={"filter": hidden, "filter namespaces": seen, **further},
        )
        for victim in ("keyd", "parent", "fork server", "worker")
    ]


ATTEMPTS = [
    # Files: the filter; then the empty root, not writable; then Landlock.
    Attempt(
        "read a file", read_file,
        without={"filter": "ENOENT", "filter landlock": "ENOENT", "filter chroot": "EACCES",
                 "filter landlock chroot": "done"},
    ),
    Attempt("read a file by open", read_file_open, without={"filter": "ENOENT"}),
    Attempt("read a file by openat2", read_file_openat2, without={"filter": "ENOENT"}),
    Attempt(
        "list the root", list_root,
        without={"filter": "EACCES", "filter chroot": "EACCES", "filter landlock": "done"},
    ),
    Attempt("look at the root", look_at_root, without={"filter": "done"}),
    Attempt(
        "create a file", create_file,
        without={"filter": "EACCES", "filter landlock": "EACCES", "filter chroot": "EACCES"},
    ),
    Attempt(
        "create a directory", create_directory,
        without={"filter": "EACCES", "filter landlock": "EACCES"},
    ),
    Attempt(
        "read /proc", read_proc,
        without={"filter": "ENOENT", "filter landlock": "ENOENT", "filter chroot": "EACCES"},
    ),
    *_in_processes("/proc/PID/mem", proc_memory, "pid", hidden="ENOENT", seen="ENOENT"),
    Attempt(
        "a file by its handle", file_by_handle,
        without={"filter": "EACCES", "filter landlock": "ENOENT",
                 "filter landlock chroot": "EPERM"},
    ),
    Attempt(
        "a made-up handle", handle_alone,
        without={"filter landlock chroot": "EPERM", "filter landlock chroot become": "EPERM"},
    ),
    # Out of the chroot: it takes a capability, each time, which goes with uid 0 if not before.
    # Landlock lets nothing be mounted at all.
    Attempt(
        "chroot twice", chroot_twice,
        without={"filter": "EPERM", "filter landlock": "EPERM", "filter become": "EPERM"},
    ),
    Attempt("mount /proc", mount_proc, without={"filter": "EPERM", "filter become": "EPERM"}),
    Attempt(
        "a new mount of /proc", fsopen_proc,
        without={"filter": "EPERM", "filter become": "done"},
    ),
    Attempt(
        "clone a mount", clone_mount, without={"filter": "EPERM", "filter become": "done"}
    ),
    Attempt(
        "a user namespace", user_namespace,
        without={"filter": "EPERM", "filter chroot": "done"},
    ),
    # Other processes.
    *_in_processes("ptrace", trace, "pid"),
    *_in_processes("read the memory", read_memory, "pid", "address"),
    *_in_processes("write the memory", write_memory, "pid", "variables"),
    *_in_processes("compare the descriptors", compare_process, "pid"),
    *_in_processes("take a descriptor", take_descriptor, "pid"),
    *_in_processes("a signal to the pid", send_signal, "pid", by_root="EPERM"),
    *_in_processes("a signal to the thread", send_thread_signal, "pid", by_root="EPERM"),
    *_in_processes("a queued signal to the pid", queue_signal, "pid", by_root="EPERM"),
    # Without a namespace, the kernel asks for the permission when there is a signal to send.
    *_in_processes("SIGIO to the pid", signal_by_descriptor, "pid", seen="done"),
    Attempt("a signal to everyone", kill_everyone, without={"filter": "ESRCH"}),
    Attempt(
        "a signal to the maker of a socket", signal_peer,
        without={"filter": "EINVAL", "filter namespaces": "EPERM"},
    ),
    # The network. The filter; an empty network namespace; Landlock.
    Attempt(
        "connect", connect_inet, ("port",),
        without={"filter": "EACCES", "filter landlock": "ENETUNREACH", "filter network": "EACCES",
                 "filter landlock network": "done"},
    ),
    Attempt(
        "connect by IPv6", connect_inet6, ("port",),
        without={"filter": "EACCES", "filter landlock": "ENETUNREACH"},
    ),
    Attempt("send a datagram", send_datagram, ("port",), without={"filter": "ENETUNREACH"}),
    Attempt(
        "connect to an abstract unix socket", connect_unix, ("number",),
        without={"filter": "ECONNREFUSED", "filter network": "EPERM",
                 "filter landlock network": "done"},
    ),
    Attempt("a unix socket", unix_socket, without={"filter": "done"}),
    Attempt("a netlink socket", netlink_socket, without={"filter": "done"}),
    Attempt(
        "a packet socket", packet_socket, without={"filter": "EPERM", "filter become": "EPERM"}
    ),
    Attempt("a pair of sockets", socket_pair, without={"filter": "done"}),
    Attempt("bind and listen", serve_clients, without={"filter": "EACCES"}),
    Attempt("listen on the client's socket", listen_on_client, stages="h"),
    Attempt(
        "connect the client's socket to elsewhere", reconnect_client, ("port",), stages="h",
        without={"filter": "EACCES", "filter landlock": "done"},
    ),
    Attempt(
        "connect the backend's socket to elsewhere by sendto", send_elsewhere, ("port",),
        stages="e", without={"filter": "EISCONN", "filter dialer": "done"},
    ),
    Attempt("set another option of the socket", keep_alive, without={"filter": "done"}),
    Attempt("have another machine's address", make_transparent, without={"filter": "EPERM"}),
    Attempt("ask a socket for more", ask_more, without={"filter": "done"}),
    Attempt("ask who made a socket", ask_who, without={"filter": "done"}),
    Attempt("ask for congestion's figures", ask_congestion, without={"filter": "done"}),
    Attempt("read a socket's errors", read_errors, without={"filter": "done"}),
    Attempt("read urgent octets", read_urgent, without={"filter": "done"}),
    Attempt("send urgent octets", send_urgent, without={"filter": "done"}),
    Attempt("speak to keyd, later", keyd_later, stages="e", stopped="EPIPE"),
    Attempt("a filter", another_filter, without={"filter": "done"}),
    Attempt("a filter's listener", notified, without={"filter": "done"}),
    Attempt("to block or not to block", not_blocking, without={"filter": "done"}),
    Attempt("a low-water mark", low_water_mark, without={"filter": "done"}),
    Attempt("pass a descriptor to the parent", pass_descriptors, without={"filter": "done"}),
    Attempt(
        "pass a descriptor to keyd", pass_descriptors_to_keyd,
        stages="h", without={"filter": "done"},
    ),
    # Before its turn comes: nothing is on its way here.
    Attempt("look ahead at descriptors", look_ahead, without={"filter": "EAGAIN"}),
    Attempt("look ahead at many messages", look_ahead_at_many, without={"filter": "EAGAIN"}),
    # It has no such socket.
    Attempt(
        "speak for another", speak_for_another, stopped="EBADF", without={"filter": "EBADF"}
    ),
    # New processes, other programs.
    Attempt("fork", fork, without={"filter": "EAGAIN", "filter nproc": "done"}),
    Attempt("vfork", vfork, without={"filter": "EAGAIN"}),
    Attempt("clone", clone, without={"filter": "EAGAIN"}),
    Attempt("clone3", clone3, without={"filter": "EAGAIN"}),
    Attempt(
        "clone into a new pid namespace", new_pid_namespace,
        without={"filter nproc": "EPERM", "filter become": "done"},
    ),
    Attempt("execute a program", execute, without={"filter": "ENOENT", "filter chroot": "EACCES"}),
    Attempt("execute by descriptor", execute_descriptor, without={"filter": "ENOENT"}),
    Attempt("outlive the parent", outlive_parent),
    # Executable memory: the filter alone.
    Attempt("map executable memory", map_executable, without={"filter": "done"}),
    Attempt("make memory executable", make_executable, without={"filter": "done"}),
    Attempt("make memory executable by key", make_executable_by_key, without={"filter": "done"}),
    Attempt("patch code", patch_text, without={"filter": "done"}),
    Attempt("move data to where code was", move_over_text, without={"filter": "done"}),
    Attempt("execute a file in memory", executable_file, without={"filter": "EFBIG"}),
    Attempt("make all that can be read executable", reading_is_executing),
    Attempt("executable shared memory", shared_executable),
    # Uids and capabilities. Root without "become", with what the fork server has: three.
    Attempt("setuid(0)", become_root, without={"filter": "EPERM", "filter namespaces": "EPERM"}),
    Attempt(
        "become somebody else", become_somebody,
        without={"filter": "EPERM", "filter become": "done"},
    ),
    Attempt("setgid(0)", become_group, without={"filter": "EPERM"}),
    Attempt(
        "join groups", join_groups, without={"filter": "EPERM", "filter become": "done"}
    ),
    Attempt(
        "take capabilities", take_capabilities,
        without={"filter": "EPERM", "filter become": "EPERM"},
    ),
    Attempt(
        "raise an ambient capability", raise_ambient,
        without={"filter": "EPERM", "filter become": "EPERM"},
    ),
    Attempt(
        "loosen the securebits", loosen_securebits,
        without={"filter": "EPERM", "filter become": "EPERM"},
    ),
    Attempt("be dumpable", be_dumpable),
    Attempt(
        "raise a limit", raise_limit, without={"filter": "EPERM", "filter become": "EPERM"}
    ),
    Attempt(
        "join another network", join_network, ("keyd pid",),
        without={"filter": "ESRCH", "filter namespaces": "EPERM"},
    ),
    # The host's memory and descriptors.
    Attempt(
        "a GiB of memory", fill_memory, stopped="ENOMEM",
        without={"filter": "ENOMEM", "filter as": "done"},
    ),
    Attempt(
        "a GiB of memory by mremap", grow_heap, stopped="ENOMEM", without={"filter as": "done"}
    ),
    Attempt(
        "lock memory", lock_memory, without={"filter": "EPERM", "filter become": "EPERM"}
    ),
    Attempt("map locked memory", map_locked, without={"filter": "EPERM"}),
    Attempt("map memory to share", share_memory, without={"filter": "done"}),
    Attempt("map a socket", map_socket, without={"filter": "done"}),
    Attempt("advise on pages", advise, without={"filter": "done"}),
    Attempt("lock with another's priority", lock_for_another, without={"filter": "done"}),
    Attempt("move who waits for a lock", requeue, without={"filter": "done"}),
    Attempt(
        "a hundred descriptors", hold_descriptors,
        without={"filter": "EMFILE", "filter nofile": "done"},
    ),
    Attempt("shared memory that stays", shared_memory),
    Attempt("a message queue that stays", message_queue),
    Attempt("a POSIX message queue", queue_of_messages),
    Attempt("a memory file", memory_file),
    Attempt("a timer", make_timer, without={"filter": "EAGAIN"}),
    Attempt("an inotify", make_inotify),
    Attempt("an epoll", make_epoll),
    Attempt("an eventfd", make_eventfd),
    Attempt("a pipe", make_pipe),
    Attempt("grow the report", grow_report, without={"filter": "EINVAL"}),
    # There is no more of the report than its page, and it can be nothing but data.
    Attempt("map more than the report", extend_report, stopped="EFAULT"),
    Attempt("map the report again, and more", copy_report, stopped="EFAULT"),
    Attempt("make the report executable", execute_report, without={"filter": "done"}),
    # The kernel's other doors.
    Attempt("io_uring", io_uring),
    Attempt("bpf", bpf, without={"filter": "EPERM", "filter become": "done"}),
    Attempt("userfaultfd", user_faults, without={"filter": "EPERM"}),
    Attempt("perf_event_open", perf_events, without={"filter": "EACCES"}),
    Attempt("a session keyring", new_keyring),
    Attempt("a key", add_key),
    Attempt("TIOCSTI", terminal_input, control="ENOTTY"),
    Attempt("a 32-bit system call", call_32_bit, without={"filter": "done"}),
    Attempt("an x32 system call", call_x32, control="done or ENOSYS"),
    Attempt("a filter of its own", filter_of_its_own),
    Attempt("a filter that allows all, then a file", allow_then_open),
]  # fmt: skip
