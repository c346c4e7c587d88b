"""The process that connects to upstreams for keyd, which opens no socket itself.

keyd starts it before it reads a key. It has a user of its own, and nothing of keyd's memory
(execve(2)). It trusts keyd, and hears nobody else: each connection goes to keyd unread, and a
connection that is lost is made again, with a pause that grows.

On a SOCK_SEQPACKET pair, the first octet of a message says what it is, the second which upstream:

=========  ======================================================================
connected  'C' upstream(1), and the connection twice, by SCM_RIGHTS
failed     'F' upstream(1) why(0..200, UTF-8)
lost       'L' upstream(1) served(1): from keyd, that a connection has ended, and
           whether it was of any use
wanted     'W' upstream(1): from keyd, that it is to be connected to now
absent     'A' upstream(1) why(0..200, UTF-8): it was wanted, and nobody is there
=========  ======================================================================
"""

import errno
import os
import resource
import select
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import prctl

from keyd.linux import landlock, seccomp
from keyd.linux.credentials import (
    become,
    forbid_regaining,
    hide_memory,
    keep_capabilities,
    limit,
)
from keyd.linux.descriptors import send_descriptors
from keyd.linux.namespaces import leave_namespaces
from keyd.linux.process import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWUTS
from keyd.linux.unix_socket import refuse_descriptors

__all__ = ["ABSENT", "CONNECTED", "FAILED", "LOST", "MAX_MESSAGE_OCTETS", "WANTED", "connect"]

CONNECTED, FAILED, LOST, WANTED, ABSENT = b"C", b"F", b"L", b"W", b"A"
#: Nobody listens there. Other errors may pass, such as a listen queue that is full (EAGAIN).
_NOBODY = errno.ENOENT, errno.ECONNREFUSED
_WHY_OCTETS = 200
MAX_MESSAGE_OCTETS = 2 + _WHY_OCTETS
_LIMITS = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 64, resource.RLIMIT_FSIZE: 0}
#: In seconds: the first and the longest pause before another attempt.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0


class _Upstream:
    """When to connect to it next; None while there is a connection."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.pause = _FIRST_PAUSE
        self.due: float | None = 0.0
        self.connected_at = 0.0

    def put_off(self) -> None:
        self.due = time.monotonic() + self.pause
        self.pause = min(2 * self.pause, _LONGEST_PAUSE)

    def lost(self, served: bool) -> None:
        """At once where it has served for a while: a reload of its own ends connections."""
        if served:
            self.pause = _FIRST_PAUSE
        if served and time.monotonic() - self.connected_at > _LONGEST_PAUSE:
            self.due = 0.0
        else:
            self.put_off()


def connect(settings: dict[str, Any], keyd: socket.socket) -> NoReturn:
    """Connect to each of these upstreams, and again, until keyd ends. Raises OSError."""
    program = seccomp.Program(bytes.fromhex(settings["filter"]))
    _confine(settings["user"])
    sys.excepthook = _end
    sys.unraisablehook = lambda _: None
    seccomp.install(program)
    upstreams = [_Upstream(path) for path in settings["paths"]]
    poll = select.poll()
    poll.register(keyd, select.POLLIN)
    while True:
        now = time.monotonic()
        for number, upstream in enumerate(upstreams):
            if upstream.due is not None and upstream.due <= now:
                _try(number, upstream, keyd)
        due = [upstream.due for upstream in upstreams if upstream.due is not None]
        wait = max(0.0, min(due) - time.monotonic()) if due else None
        if poll.poll(None if wait is None else wait * 1000 + 1):
            message = keyd.recv(MAX_MESSAGE_OCTETS)
            if not message:
                os._exit(0)
            _hear(message, upstreams, keyd)


def _end(*unforeseen: object) -> NoReturn:
    """Nobody would read why: standard error is /dev/null.

    For a traceback, Python would open its source files. The filter would kill this process for it,
    as one that was taken over.
    """
    del unforeseen
    os._exit(1)


def _hear(message: bytes, upstreams: Sequence[_Upstream], keyd: socket.socket) -> None:
    if message[:1] == LOST:
        _, number, served = message
        upstreams[number].lost(bool(served))
        return
    _, number = message
    upstream = upstreams[number]
    if upstream.due is not None:
        upstream.pause = _FIRST_PAUSE
        _try(number, upstream, keyd, wanted=True)


def _try(number: int, upstream: _Upstream, keyd: socket.socket, wanted: bool = False) -> None:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as connection:
            # Whoever accepts might send keyd what it has to wait for in closing it.
            refuse_descriptors(connection)
            connection.connect(upstream.path)
            twice = [connection.fileno()] * 2
            send_descriptors(keyd, CONNECTED + bytes((number,)), twice, socket.MSG_DONTWAIT)
            upstream.due, upstream.connected_at = None, time.monotonic()
    except OSError as error:
        upstream.put_off()
        said = ABSENT if wanted and error.errno in _NOBODY else FAILED
        why = os.strerror(error.errno or 0).encode()[:_WHY_OCTETS]
        with suppress(OSError):
            keyd.send(said + bytes((number,)) + why, socket.MSG_DONTWAIT)


def _confine(user: Sequence[Any]) -> None:
    """Give up all but connecting to unix sockets; raises OSError."""
    uid, gid, groups = user
    limit(_LIMITS)
    if os.geteuid() == 0:
        leave_namespaces(CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNET)
        kept = {prctl.CAP_SETUID, prctl.CAP_SETGID, prctl.CAP_SETPCAP}
        keep_capabilities(kept)
        forbid_regaining(kept)
        become(uid, gid, groups)
    prctl.set_no_new_privs(1)
    hide_memory()
    if landlock.version():
        # A path can be connected to without any of these rights.
        ruleset = landlock.make_ruleset()
        landlock.restrict_self(ruleset)
        os.close(ruleset)
