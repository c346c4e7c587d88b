"""Reads the key files for a keyd of its own: at its start, and again once that is confined.

It is forked from a keyd of its own before that has read a key, with what reading takes: keyd's
uid, or root with the one capability to read files of others. For each order, which is one octet, it
forks once more; that process reads, sends what it has read, and ends. So no key stays here. What
keyd can have of it are the keys of the files that keyd was started with.

Each message to keyd is one packet of a SOCK_SEQPACKET pair, a path being preceded by its length(2):

======  ===============================
key     'K' path, and the key in PKCS #8
bad     'B' path, and why it is no key
end     'E': that was all
failed  'F' why: the reading has ended before that
======  ===============================
"""

import os
import signal
import socket
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import prctl
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from keyd.confinement import CannotLock, lock_before_keys
from keyd.key_files import KeySources
from keyd.keys import UnusableKey
from keyd.linux import landlock
from keyd.linux.child_end import ChildEnd
from keyd.linux.credentials import hide_memory, keep_capabilities
from keyd.linux.namespaces import leave_namespaces
from keyd.linux.process import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWUTS, how_ended
from keyd.linux.title import set_title
from keyd.linux.unix_socket import refuse_descriptors

__all__ = ["MAX_MESSAGE_OCTETS", "ORDER", "start"]

ORDER = b"r"
#: A path, and RSA with 8192 bits in PKCS #8.
MAX_MESSAGE_OCTETS = 16 * 1024
#: How often to look whether a reading has ended, where nothing tells, in seconds.
_LOOK = 1.0
_LENGTH = struct.Struct("!H")


def start(sources: KeySources, must_lock: bool) -> socket.socket:
    """Start the process; returns keyd's end of the socket to it. Raises OSError.

    If it ``must_lock`` its memory and cannot, it reads no key.

    To be called before keyd has threads, keys or anything to give up.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    refuse_descriptors(ours)
    sys.stderr.flush()
    if os.fork():
        theirs.close()
        return ours
    try:
        _serve(sources, theirs, must_lock)
    finally:
        # Not back into keyd's code, whatever has happened.
        os._exit(1)


def _serve(sources: KeySources, keyd: socket.socket, must_lock: bool) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGINT):
        # For keyd. This process ends with it.
        signal.signal(number, signal.SIG_IGN)
    descriptor = os.dup2(keyd.detach(), 3)
    os.closerange(4, 1 << 20)
    keyd = socket.socket(fileno=descriptor)
    set_title("keyd-reader", "keyd: reads keys again")
    try:
        _confine(sources)
    except OSError as error:
        _fail(keyd, f"the process for that cannot be confined: {error}")
        os._exit(1)
    while keyd.recv(len(ORDER)):
        try:
            child = os.fork()
        except OSError as error:
            # EAGAIN, ENOMEM: that may pass.
            _fail(keyd, f"no process can be made for that: {error.strerror}")
            continue
        if child == 0:
            prctl.set_pdeathsig(signal.SIGKILL)
            try:
                lock_before_keys(must_lock)
                _read(sources, keyd)
            except CannotLock as error:
                _fail(keyd, str(error))
            os._exit(0)
        end = ChildEnd(child, keyd)
        while (code := end.code(_LOOK)) is None:
            if end.other_has_ended:
                # A file may take for ever.
                os._exit(0)
        if code:
            _fail(keyd, f"the process for that {how_ended(code)}")
    os._exit(0)


def _read(sources: KeySources, keyd: socket.socket) -> None:
    """Send what is in the files now. Waits for keyd to take it."""
    try:
        for path, found in sources.load():
            named = os.fsencode(path)
            head = _LENGTH.pack(len(named)) + named
            if isinstance(found, UnusableKey):
                # It names the file, which may be named in anything.
                keyd.send(b"B" + head + os.fsencode(found.reason))
            else:
                octets = found.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
                keyd.send(b"K" + head + octets)
        keyd.send(b"E")
    except OSError as error:
        # The directory is gone. Or keyd is, and hears nothing.
        _fail(keyd, str(error))


def _fail(keyd: socket.socket, why: str) -> None:
    with suppress(OSError):
        keyd.send(b"F" + why.encode())


def _confine(sources: KeySources) -> None:
    """Keep the right to read what is in the directories of the keys, and nothing else."""
    if os.geteuid() == 0:
        leave_namespaces(CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
        keep_capabilities({prctl.CAP_DAC_READ_SEARCH, prctl.CAP_IPC_LOCK})
    prctl.set_no_new_privs(1)
    hide_memory()
    if landlock.version():
        ruleset = landlock.make_ruleset()
        for directory in _directories(sources):
            with suppress(FileNotFoundError):
                landlock.allow_using(ruleset, directory, writing=False)
        landlock.restrict_self(ruleset)
        os.close(ruleset)


def _directories(sources: KeySources) -> Iterable[str]:
    """Where the files are, and where links lead: there, others may come in their places."""
    paths = [*sources.files, *filter(None, (sources.directory, sources.passphrase_file))]
    found = {os.path.dirname(os.path.abspath(path)) for path in paths}
    found |= {str(Path(path).resolve().parent) for path in paths}
    return {*found, *filter(None, (sources.directory,))}
