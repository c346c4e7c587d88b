"""The audit's TLS client: a process of its own, without a key and without privileges.

Started as root by ``titus-py audit``, with one socket, which the audit connects once this process
is confined: its peer is the worker that the audit doubts. The audit does not trust it either, and
decodes its answers strictly (``probe``).
"""

import json
import os
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable
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
from keyd.system_calls import MEMORY
from keyd.words import end_at_the_unforeseen

__all__ = ["MAX_ANSWER_OCTETS", "main"]

#: A certificate has at most 2^24 - 1 octets (RFC 8446 §4.4.2), and rarely more than a few KiB.
MAX_ANSWER_OCTETS = 128 * 1024
_MAX_ORDER_OCTETS = 4096
#: How long the peer may take for the handshake, in all: for longer than worker.handshake_timeout is
#: by default, after which a worker ends it itself, and for less than the audit waits for this
#: process. So a slow machine alone is no alarm.
_SECONDS = 20.0
#: How long to wait for the server's close_notify.
_FAREWELL_SECONDS = 1.0
_SHORTEST_WAIT_SECONDS = 0.001
_DESCRIPTORS = 8
_MAX_RECEIVED = 65536

_ANYHOW: tuple[tuple[seccomp.Only, ...], ...] = ((),)
_ALLOWED: seccomp.Rules = {
    # For the peer and the audit; and for a last word on standard error.
    "write": _ANYHOW,
    "recvfrom": _ANYHOW,
    "sendto": _ANYHOW,
    "poll": _ANYHOW,
    "ppoll": _ANYHOW,
    "close": _ANYHOW,
    # FIONBIO, for a timeout.
    "ioctl": ((seccomp.Only(1, 0xFFFF_FFFF, 0x5421),),),
    **MEMORY,
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
    """Serve the audit's orders, each one packet of JSON: "begin", "handshake", "goodbye"."""
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
    order = json.loads(control.recv(_MAX_ORDER_OCTETS) or b"{}")
    if order.get("do") == "begin":
        client = Client(context, peer, order["name"], order["alpn"])
        control.send(json.dumps(client.begin()).encode())
        if control.recv(_MAX_ORDER_OCTETS):
            answer = shake_hands(client)
            control.send(json.dumps(answer).encode())
            if "version" in answer and control.recv(_MAX_ORDER_OCTETS):
                control.send(json.dumps({"said": client.say_goodbye()}).encode())
    os._exit(0)


class Client:
    """TLS's client side on a connected socket."""

    def __init__(
        self,
        context: ssl.SSLContext,
        peer: socket.socket,
        name: str | None,
        alpn: list[str] | None,
        seconds: float = _SECONDS,
    ) -> None:
        if alpn is not None:
            context.set_alpn_protocols(alpn)
        self._peer = peer
        self._from_peer, self._to_peer = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._from_peer, self._to_peer, server_hostname=name)
        self._seconds = seconds

    def begin(self) -> dict[str, str]:
        """Send the ClientHello: before it is there, no worker is. Returns what to answer."""
        with suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        self._peer.settimeout(self._seconds)
        try:
            self._peer.sendall(self._to_peer.read())
        except OSError as error:
            return {"error": str(error)}
        return {}

    def shake_hands(self) -> None:
        """Raises OSError."""
        self._drive(self.tls.do_handshake, self._seconds)

    def say_goodbye(self) -> bool:
        """Send close_notify; returns whether the server sent one, too."""
        try:
            self._drive(self.tls.unwrap, _FAREWELL_SECONDS)
            self._peer.close()
        except (OSError, ValueError):
            return False
        return True

    def _drive(self, step: Callable[[], object], seconds: float) -> None:
        deadline = time.monotonic() + seconds

        def send() -> None:
            # A timeout of 0 would mean "do not wait", and fail in other words.
            self._peer.settimeout(max(deadline - time.monotonic(), _SHORTEST_WAIT_SECONDS))
            if octets := self._to_peer.read():
                self._peer.sendall(octets)

        while True:
            try:
                step()
                send()
                return
            except ssl.SSLWantReadError:
                send()
                if time.monotonic() > deadline:
                    raise TimeoutError("timed out") from None
                octets = self._peer.recv(_MAX_RECEIVED)
                if octets:
                    self._from_peer.write(octets)
                else:
                    self._from_peer.write_eof()


def shake_hands(client: Client) -> dict[str, str]:
    """Make the handshake; returns what to answer."""
    try:
        client.shake_hands()
    except OSError as error:
        return {"error": str(error)}
    shown = client.tls.getpeercert(True) or b""
    return {"version": client.tls.version() or "", "certificate": shown.hex()}


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
    end_at_the_unforeseen("titus-py: the audit's client")
    seccomp.install(seccomp.Program(program))


if __name__ == "__main__":
    sys.exit(main())
