"""Which uids are in use: by instances of titus-py, and by any process.

An instance holds its uids for as long as its supervisor lives. ``titus-py check`` and the start of
another instance look at them. A range is held by a lock on as many octets of one file, octet N for
uid N, so that the kernel sees whether two ranges overlap. The holder writes its pid and its
configuration file into these octets. The file is root's alone, and trusted.

The locks are those of an open file description (fcntl(2), F_OFD_SETLK). They end with its last
descriptor, however the process ends. A program that keeps the descriptor over an execve(2) keeps
them.
"""

import fcntl
import json
import os
import re
import struct
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "UIDS_FILE",
    "Held",
    "HeldUids",
    "Holder",
    "any_process_has",
    "holder",
    "is_running",
    "process_with",
]

UIDS_FILE = Path("/run/titus-py/uids")
#: struct flock (fcntl(2)): type, whence, start, length, process; of 64 bits.
_FLOCK = struct.Struct("@hhqqi0q")
_NOTE_OCTETS = 4096
_LOOK_SECONDS = 0.05
#: Of /proc/PID/status: the state, the real uid, and how many threads there are.
_STATUS = re.compile(rb"^State:\t(.).*^Uid:\t(\d+).*^Threads:\t(\d+)$", re.MULTILINE | re.DOTALL)


class Holder(NamedTuple):
    """A supervisor that holds uids, with its configuration file ("" if it has options instead)."""

    pid: int
    file: str
    shared: bool  #: only as keyd.user

    def is_ours(self, file: str) -> bool:
        """Whether the holder is the instance with this file, this process, or its parent."""
        return bool(file and file == self.file) or self.pid in (os.getpid(), os.getppid())

    def __str__(self) -> str:
        what = f"of {self.file}" if self.file else "with options"
        return f"the instance {what}, process {self.pid}" if self.pid else "another instance"


class Held(Exception):
    """Another instance holds some of these uids."""

    def __init__(self, uids: range, by: Holder) -> None:
        super().__init__(f"some of {uids[0]} to {uids[-1]} are those of {by}")


class HeldUids:
    """The uids that this process holds until it ends."""

    def __init__(self, descriptor: int = -1, path: Path = UIDS_FILE) -> None:
        """``descriptor`` is that of the file, if the previous program left it (``succession``)."""
        self._path = path
        self.descriptor = descriptor

    def hold(self, workers: range, keyd: int | None, file: str) -> None:
        """Hold these uids too. Instances may share the uid ``keyd``. Raises Held, OSError.

        Without a ``file``, that of this process's previous program remains, if that held them.
        """
        if not file and self.descriptor >= 0 and (noted := _noted(self.descriptor, workers[0])):
            file = noted.file if noted.pid == os.getpid() else ""
        if self.descriptor >= 0 and not self._is_found():
            # Somebody has removed the file, and others would lock another one.
            os.close(self.descriptor)
            self.descriptor = -1
        if self.descriptor < 0:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self.descriptor = os.open(self._path, flags, 0o600)
        self._lock(workers, fcntl.F_WRLCK)
        note = json.dumps({"pid": os.getpid(), "file": file}).encode() + b"\n"
        os.pwrite(self.descriptor, note[: len(workers)], workers[0])
        if keyd is not None:
            self._lock(range(keyd, keyd + 1), fcntl.F_RDLCK)
        if file:
            self._lock(_instance(file), fcntl.F_RDLCK)

    def _is_found(self) -> bool:
        """Whether others find the file."""
        try:
            return os.path.samestat(os.lstat(self._path), os.fstat(self.descriptor))
        except OSError:
            return False

    def _lock(self, uids: range, kind: int) -> None:
        wanted = _FLOCK.pack(kind, os.SEEK_SET, uids[0], len(uids), 0)
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_OFD_SETLK, wanted)
        except (BlockingIOError, PermissionError):
            by = _holder(self.descriptor, uids, kind)
            raise Held(uids, by or Holder(0, "", False)) from None


def is_running(file: str, path: Path = UIDS_FILE) -> bool:
    """Whether an instance with this configuration file holds any uids."""
    return holder(_instance(file), path) is not None


def _instance(file: str) -> range:
    """An octet beyond all uids, for the instances with this file."""
    octet = (1 << 33) + zlib.crc32(os.fsencode(file))
    return range(octet, octet + 1)


def holder(uids: range, path: Path = UIDS_FILE) -> Holder | None:
    """The instance that holds any of these uids, if it can be seen. Raises nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return _holder(descriptor, uids, fcntl.F_WRLCK)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _holder(descriptor: int, uids: range, kind: int) -> Holder | None:
    wanted = _FLOCK.pack(kind, os.SEEK_SET, uids[0], len(uids), 0)
    found = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, wanted)
    their_kind, _, start, _, _ = _FLOCK.unpack(found)
    if their_kind == fcntl.F_UNLCK:
        return None
    if their_kind == fcntl.F_RDLCK:
        return Holder(0, "", shared=True)
    return _noted(descriptor, start) or Holder(0, "", shared=False)


def _noted(descriptor: int, start: int) -> Holder | None:
    """Who has written that these uids are theirs."""
    with suppress(ValueError, KeyError, TypeError):
        note = json.loads(os.pread(descriptor, _NOTE_OCTETS, start).partition(b"\n")[0])
        return Holder(int(note["pid"]), str(note["file"]), shared=False)
    return None


def any_process_has(uids: range) -> bool:
    """Whether any process that can be seen from here has one of these uids."""
    return process_with(uids) is not None


def process_with(uids: range, patience: float = 0.0) -> int | None:
    """The first of these uids that a process still has after ``patience`` seconds; None if none.

    Asks getpriority(2), which knows each process of a user. /proc alone is not asked: a service
    manager may have hidden other users' processes there (ProtectProc=).

    A zombie does not count, where /proc shows that it is one. It has no memory, no descriptor and
    no thread left, and no signal does anything to it. Whoever has its uid next gains nothing by it.
    An instance that is killed in a container leaves many, if process 1 there reaps nobody.
    """
    until = time.monotonic() + patience
    while (uid := _first_with_processes(uids)) is not None:
        if time.monotonic() >= until:
            return uid
        time.sleep(_LOOK_SECONDS)
    return None


def _first_with_processes(uids: range) -> int | None:
    zombies: frozenset[int] | None = None
    for uid in filter(_has_processes, uids):
        if zombies is None:
            zombies = _uids_of_zombies()
        if uid not in zombies:
            return uid
    return None


def _has_processes(uid: int) -> bool:
    try:
        # Python takes a C int, so a uid from 2^31 on is passed as a negative number.
        os.getpriority(os.PRIO_USER, uid if uid < 1 << 31 else uid - (1 << 32))
    except ProcessLookupError:
        return False
    return True


def _uids_of_zombies() -> frozenset[int]:
    """The uids that zombies have, and no other process that /proc shows."""
    zombies: set[int] = set()
    others: set[int] = set()
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (found := _STATUS.search((directory / "status").read_bytes())) is not None:
                state, uid, threads = found.groups()
                # The first thread is a zombie also if it has ended before the others.
                (zombies if (state, threads) == (b"Z", b"1") else others).add(int(uid))
    return frozenset(zombies - others)
