"""Which files have a key, of those that are small enough, and whose they are; what was not read.

Run by ``keyd audit``, as root: the key is in this process. What is in a file is compared with the
key, and not parsed. What is mounted below a directory has a search of its own if it is a disk, or
memory, as any user's directory in /run is. Else it is named: it may be another host's, or
somebody's program, and answer never.
"""

import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any

from keyd.inspection import small_files
from keyd.inspection.commands import DIRECTORIES
from keyd.inspection.findings import (
    BROKEN,
    HOLDS,
    NOT_AVAILABLE,
    Finding,
    first_of,
    key_of,
    not_all,
)
from keyd.inspection.key_search import Needle
from keyd.inspection.occurrences import occurrences
from keyd.inspection.watched import At, Hung, Patience, each
from keyd.linux.mounts import Mount, mounts, uncovered

__all__ = ["files_with_keys"]

#: systemd hands a file here to the unit's user alone (systemd.exec(5), "Credentials").
_CREDENTIALS = "/run/credentials"
_IN_MEMORY = "tmpfs", "ramfs"
#: So long those may take in all who have leases on files, as a file server has for its clients.
_LEASE_SECONDS, _PAUSE_SECONDS = 10.0, 0.1
_MISSING, _NO_DIRECTORY = map(os.strerror, (errno.ENOENT, errno.ENOTDIR))
#: What the kernel makes up, and nobody can put a key into.
_OF_THE_KERNEL = (
    *("binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts"),
    *("devtmpfs", "efivarfs", "fusectl", "mqueue", "nsfs", "proc", "pstore", "rpc_pipefs"),
    *("securityfs", "selinuxfs", "sysfs", "tracefs"),
)
#: A container's root, mostly: of the container, and not of what is looked for here.
_OVERLAY = "overlay"


def files_with_keys(
    sought: Sequence[Needle], directories: Sequence[str] | None, patience: Patience
) -> Iterator[Finding]:
    """In these directories, or the usual ones, some of which need not be there."""
    octets = tuple(needle.octets for needle in sought)
    real: dict[str, str] = {}
    for start, answer in each(directories or DIRECTORIES, _real, os.cpu_count() or 1):
        if isinstance(answer, Hung):
            yield Finding("file", start, not_all(answer), NOT_AVAILABLE)
        else:
            real[start] = answer
    # systemd's credentials are on file systems of their own.
    starts = {*real.values(), *map(str, Path(_CREDENTIALS).glob("*"))}
    mounted = {
        one.path: one.kind
        for one in uncovered(mounts())
        if one.is_local and any(_is_below(one.path, start) for start in real.values())
    }
    starts |= mounted.keys()
    in_memory = {path for path, kind in mounted.items() if kind in _IN_MEMORY} - {*real.values()}

    def look(start: str, _: frozenset[str], at: At) -> Any:
        search = _Search(sought, octets)
        search.look_below(start, at)
        return search.findings, search.unread, search.elsewhere, search.too_large

    # Others may go while they are looked for, as a user's does in /run. And a file may be mounted,
    # as a container's /etc/hosts: it is read with the directory that it is in.
    needed = set(real.values()) if directories else set()
    # Of those that hang, that is said already.
    known = starts | set(directories or DIRECTORIES)
    # The directories that were asked for are the first.
    ordered = sorted(starts - in_memory, key=lambda start: (start not in real.values(), start))
    processes = os.cpu_count() or 1
    for start, answer in chain(
        each(ordered, look, processes, most_seconds=inf, patience=patience),
        # Users may make directories there for as long as they are searched.
        each(sorted(in_memory), look, processes, patience=patience),
    ):
        if isinstance(answer, Hung):
            yield Finding("file", start, not_all(answer), NOT_AVAILABLE)
            continue
        findings, unread, elsewhere, too_large = answer
        yield from (Finding(*fields) for fields in findings)
        if start not in needed:
            ours = [start, _MISSING], [start, _NO_DIRECTORY]
            unread = [one for one in unread if one not in ours]
        if unread:
            named = first_of([f"{path} ({reason})" for path, reason in unread])
            yield Finding("file", start, f"not all could be read: {named}", NOT_AVAILABLE)
        others = [Mount(*one) for one in elsewhere]
        yield from _mounted_below(start, [one for one in others if one.path not in known])
        if too_large:
            text = f"{too_large} larger than {small_files.LARGEST} octets were not read"
            yield Finding("file", start, text, HOLDS)


def _mounted_below(start: str, found: Sequence[Mount]) -> Iterator[Finding]:
    """What no key can be in is not named. Nor does an audit fail for what any user may mount."""
    for verdict in (NOT_AVAILABLE, HOLDS):
        named = [
            f"{one.path} ({one.kind})"
            for one in found
            if one.kind not in _OF_THE_KERNEL
            and (verdict == HOLDS) == (one.is_of_a_user or one.kind == _OVERLAY)
        ]
        if named:
            text = f"not looked at, as something else is mounted there: {first_of(named)}. Give it "
            yield Finding("file", start, f"{text}with --directory", verdict)


def _real(start: str, _: frozenset[str], at: At) -> str:
    at(start, "")
    return os.path.realpath(start)


def _is_below(path: str, start: str) -> bool:
    return path.startswith(f"{start.rstrip('/')}/")


class _Search:
    """Of one directory, for all keys."""

    def __init__(self, sought: Sequence[Needle], octets: tuple[bytes, ...]) -> None:
        self.findings: list[Finding] = []
        self.unread: list[tuple[str, str]] = []
        self.elsewhere: list[Mount] = []
        self.too_large = 0
        self._sought, self._octets = sought, octets

    def look_below(self, start: str, at: At) -> None:
        files = small_files.below(
            start,
            lambda place: at(place, ""),
            lambda path, why: self.unread.append((path, why)),
            self.elsewhere.append,
        )
        leased = [file for file in files if not self._look_at(file)]
        until = time.monotonic() + _LEASE_SECONDS
        while leased and time.monotonic() < until:
            time.sleep(_PAUSE_SECONDS)
            leased = [file for file in leased if not self._look_at(file)]
        why = os.strerror(errno.EAGAIN)
        self.unread += ((file, why) for file in leased)

    def _look_at(self, file: str) -> bool:
        """False if somebody has a lease on it, and is asked to give that back (fcntl(2))."""
        try:
            opened = small_files.read(file)
        except BlockingIOError:
            return False
        except small_files.TooLarge:
            self.too_large += 1
        except OSError as error:
            self.unread.append((file, error.strerror or "cannot be read"))
        else:
            if opened is not None:
                self._compare(file, *opened)
        return True

    def _compare(self, file: str, seen: os.stat_result, content: bytes) -> None:
        places = occurrences(content, self._octets, 1)
        for path in sorted({key_of(self._sought[which].name) for _, which in places}):
            mode = stat.filemode(seen.st_mode)[1:]
            alone = seen.st_uid == 0 and not seen.st_mode & 0o077
            good = alone or file.startswith(f"{_CREDENTIALS}/")
            text = f"in {file} ({mode}, uid {seen.st_uid}, gid {seen.st_gid})"
            self.findings.append(Finding("file", path, text, HOLDS if good else BROKEN))
