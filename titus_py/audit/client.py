"""The audit's TLS client: a process of its own, without a key and without privileges.

Started as root by ``titus-py audit``, with one connected socket. It confines itself before it
reads from that socket: its peer is the worker that the audit doubts. The audit does not trust
it either, and decodes its answers strictly (``probe``).
"""

import json
import mmap
import os
import resource
import signal
import socket
import ssl
import sys
from contextlib import suppress

import prctl

from keyd.linux import seccomp
from keyd.linux.credentials import (
    become,
    controllable_speculation,
    enter_empty_root,
    forbid_regaining,
    hide_memory,
    keep_capabilities,
    limit,
    stop_speculation,
)
from keyd.linux.namespaces import leave_namespaces
from keyd.linux.process import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWUTS

__all__ = ["MAX_ANSWER_OCTETS", "main"]

#: A certificate has at most 2^24 - 1 octets (RFC 8446 §4.4.2), and rarely more than a few KiB.
MAX_ANSWER_OCTETS = 128 * 1024
_MAX_ORDER_OCTETS = 4096
_SECONDS = 5.0
#: How long to wait for the server's close_notify.
_FAREWELL_SECONDS = 1.0
_DESCRIPTORS = 8

_ANYHOW: tuple[tuple[seccomp.Only, ...], ...] = ((),)
_NOT_EXECUTABLE = ((seccomp.Only(2, mmap.PROT_EXEC, 0),),)
_ALLOWED: seccomp.Rules = {
    # For the peer (by OpenSSL), and for the audit.
    "read": _ANYHOW,
    "write": _ANYHOW,
    "recvfrom": _ANYHOW,
    "sendto": _ANYHOW,
    "poll": _ANYHOW,
    "ppoll": _ANYHOW,
    "close": _ANYHOW,
    # Python asks a socket what it is as TLS begins on it. FIONBIO is for its timeout.
    "getsockname": _ANYHOW,
    "getpeername": _ANYHOW,
    "getsockopt": _ANYHOW,
    "ioctl": ((seccomp.Only(1, 0xFFFF_FFFF, 0x5421),),),
    # Memory, none of it executable.
    "brk": _ANYHOW,
    "mmap": _NOT_EXECUTABLE,
    "mprotect": _NOT_EXECUTABLE,
    "mremap": _ANYHOW,
    "munmap": _ANYHOW,
    "madvise": _ANYHOW,
    # OpenSSL: to see whether it was forked, and for entropy.
    "getpid": _ANYHOW,
    "getrandom": _ANYHOW,
    # Time, threads, the end.
    "futex": _ANYHOW,
    "clock_gettime": _ANYHOW,
    "restart_syscall": _ANYHOW,
    "rt_sigreturn": _ANYHOW,
    "rt_sigprocmask": _ANYHOW,
    "rt_sigaction": _ANYHOW,
    "exit": _ANYHOW,
    "exit_group": _ANYHOW,
}


def main() -> int:
    """Serve the audit's orders, each one packet of JSON: "handshake", and then "goodbye"."""
    uid, chroot, control_fd, peer_fd = sys.argv[1:]
    control, peer = socket.socket(fileno=int(control_fd)), socket.socket(fileno=int(peer_fd))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    _rehearse(context)
    try:
        _confine(int(uid), chroot)
    except OSError as error:
        control.send(json.dumps({"cannot": str(error)}).encode())
        return 1
    control.send(json.dumps({"confined": True}).encode())
    peer.settimeout(_SECONDS)
    order = json.loads(control.recv(_MAX_ORDER_OCTETS) or b"{}")
    if order.get("do") == "handshake":
        connection, answer = shake_hands(context, peer, order["name"], order["alpn"])
        control.send(json.dumps(answer).encode())
        if connection is not None and control.recv(_MAX_ORDER_OCTETS):
            control.send(json.dumps({"said": _say_goodbye(connection)}).encode())
    os._exit(0)


def shake_hands(
    context: ssl.SSLContext, peer: socket.socket, name: str | None, alpn: list[str] | None
) -> tuple[ssl.SSLSocket | None, dict[str, str]]:
    """Make the handshake; returns the connection, and what to answer."""
    if alpn is not None:
        context.set_alpn_protocols(alpn)
    try:
        connection = context.wrap_socket(peer, server_hostname=name)
    except OSError as error:
        return None, {"error": str(error)}
    shown = connection.getpeercert(True) or b""
    return connection, {"version": connection.version() or "", "certificate": shown.hex()}


def _say_goodbye(connection: ssl.SSLSocket) -> bool:
    """Send close_notify; returns whether the server sent one, too."""
    connection.settimeout(_FAREWELL_SECONDS)
    try:
        connection.unwrap().close()
    except (OSError, ValueError):
        return False
    return True


def _rehearse(context: ssl.SSLContext) -> None:
    """Load what a handshake would load late, from files that are out of reach by then."""
    first = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="audit.invalid")
    with suppress(ssl.SSLWantReadError):
        first.do_handshake()


def _confine(uid: int, chroot: str) -> None:
    """Leave everything behind but the two sockets, for good. Raises OSError."""
    program = seccomp.build(_ALLOWED)
    leave_namespaces(CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    enter_empty_root(chroot)
    stop_speculation(controllable_speculation())
    last_needed = {prctl.CAP_SETUID, prctl.CAP_SETGID, prctl.CAP_SETPCAP}
    keep_capabilities(last_needed)
    forbid_regaining(last_needed)
    become(uid, uid)
    # After become(): a change of uid undoes these two.
    hide_memory()
    prctl.set_pdeathsig(signal.SIGKILL)
    limit(
        {
            resource.RLIMIT_NPROC: 0,
            resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NOFILE: _DESCRIPTORS,
        }
    )
    seccomp.install(seccomp.Program(program))


if __name__ == "__main__":
    sys.exit(main())
