"""``keyd audit``: where the keys of each keyd are, who may ask for signatures, what was refused.

Run by root. This process reads the keys, to look for them: its memory is locked and cannot be
dumped, as keyd's. It compares what it finds in processes and files with the keys, and parses none
of it. Which files have the keys it believes of keyd. So a keyd that was taken over could have it
read another file of keys, and say where that key is; to whoever reads the audit, and nobody else.
"""

import argparse
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from keyd.inspection import auditors
from keyd.inspection.commands import DIRECTORIES
from keyd.inspection.key_search import Needle, Search, needles, search
from keyd.inspection.occurrences import occurrences
from keyd.inspection.reports import NONE_RUNS, Running, printable, running
from keyd.inspection.status import who_may_ask
from keyd.inspection.watched import At, Hung, each
from keyd.keys import UnusableKey, load_private_key, read
from keyd.linux.credentials import lock_memory_meanwhile
from keyd.powers import PrivateKey
from keyd.reference import key_id

__all__ = ["audit"]

_HOLDS, _BROKEN, _NOT_AVAILABLE = "holds", "broken", "not available"
#: How large a file is at most that holds a key.
_LARGEST_FILE = 256 * 1024
#: systemd hands a file here to the unit's user alone (systemd.exec(5), "Credentials").
_CREDENTIALS = "/run/credentials"
#: In one file, so many places are enough to tell which keys it holds.
_PLACES = 100
#: A file that is said to be a key's may be larger than the memory.
_read_key = partial(read, most=_LARGEST_FILE)


#: It has the keys that it looks for.
_AN_AUDIT = "is another audit's"


class _Finding(NamedTuple):
    check: str
    subject: str
    seen: str
    verdict: str


def audit(arguments: argparse.Namespace) -> int:
    keyds = running()
    if not keyds and not arguments.key:
        print(f"keyd: {NONE_RUNS}. Or name a key to look for, with --key", file=sys.stderr)
        return 2
    findings = [*_askers(keyds), *_refusals(keyds), *_tokens(keyds)]
    auditors.join()
    keys: dict[str, PrivateKey] = {}
    findings += _load(keyds, arguments, keys)
    sought = [
        Needle(f"{path}: {needle.name}", needle.octets)
        for path, key in keys.items()
        for needle in needles(key)
    ]
    if sought:
        findings += _memory(keyds, keys, sought)
        findings += _files(sought, arguments.directory or DIRECTORIES)
    if arguments.json:
        json.dump([finding._asdict() for finding in findings], sys.stdout, indent=2)
        print()
    else:
        for check, subject, seen, verdict in findings:
            print(printable(f"{verdict:13} {check:7} {subject}: {seen}"))
    return 0 if all(finding.verdict == _HOLDS for finding in findings) else 1


def _askers(keyds: Sequence[Running]) -> Iterator[_Finding]:
    for keyd in keyds:
        if keyd.report is None:
            yield _Finding("asks", keyd.title, keyd.problem, _NOT_AVAILABLE)
            continue
        for path in keyd.report.sockets:
            seen = who_may_ask(path)
            if "problem" in seen:
                yield _Finding("asks", keyd.title, f"{path}: {seen['problem']}", _NOT_AVAILABLE)
                continue
            # To connect takes the right to write (unix(7)).
            everybody = seen["mode"][7] == "w"
            who = "everybody" if everybody else f"{seen['user']}, and group {seen['group']}"
            text = f"{who}, at {path} ({seen['mode']})"
            yield _Finding("asks", keyd.title, text, _BROKEN if everybody else _HOLDS)


def _refusals(keyds: Sequence[Running]) -> Iterator[_Finding]:
    """They are shown, and not judged: what they mean is in the log of whoever asked."""
    for keyd in keyds:
        if keyd.report is not None:
            refused = sorted(keyd.report.refused.items())
            text = ", ".join(f"{status} {count}" for status, count in refused) or "nothing"
            if keyd.report.last_refused:
                last = keyd.report.last_refused[-1]
                text += f"; the last one, {last.detail} (process {last.process})"
            yield _Finding("refused", keyd.title, text, _HOLDS)


def _tokens(keyds: Sequence[Running]) -> Iterator[_Finding]:
    """Shown as well: the keys of one that cannot be used are not known, and in it all the same."""
    for keyd in keyds:
        for name, state, _ in keyd.report.tokens if keyd.report is not None else ():
            yield _Finding("token", keyd.title, f"{name}: {state}", _HOLDS)


# --- where the keys are -----------------------------------------------------------


def _load(
    keyds: Sequence[Running], arguments: argparse.Namespace, keys: dict[str, PrivateKey]
) -> Iterator[_Finding]:
    """Load each key once, by the path of its file; a finding for each that cannot be."""
    wanted = dict.fromkeys(arguments.key, "")
    for keyd in keyds:
        for path, _, identity in keyd.report.keys if keyd.report is not None else ():
            wanted[path] = identity
    known: set[bytes] = set()
    for path, identity in wanted.items():
        if identity and _is_in_a_token(path):
            yield _Finding("key", path, "is in a token, and not looked for", _HOLDS)
            continue
        try:
            encrypted = b"ENCRYPTED" in _read_key(path, "key")
            passphrase_file = arguments.passphrase_file if encrypted else None
            key = load_private_key(path, passphrase_file, _read_key)
        except UnusableKey as error:
            yield _Finding("key", path, f"{error}: give it with --key", _NOT_AVAILABLE)
            continue
        found = key_id(key.public_key())
        if identity and found.hex() != identity:
            yield _Finding("key", path, "is not the key that keyd has any more", _NOT_AVAILABLE)
        elif found not in known:
            known.add(found)
            keys[path] = key
    with suppress(OSError):
        lock_memory_meanwhile()


def _memory(
    keyds: Sequence[Running], keys: Mapping[str, PrivateKey], sought: Sequence[Needle]
) -> Iterator[_Finding]:
    """Look at the memory of every process, but for this one's."""
    pids = {int(name) for name in os.listdir("/proc") if name.isdigit()} - {os.getpid()}
    holders: dict[str, set[int]] = {path: set() for path in keys}

    def look(pid: int, avoid: frozenset[str], at: At) -> Search | str:
        return _search(pid, sought, avoid, at)

    for pid, answer in each(sorted(pids), look, os.cpu_count() or 1):
        if isinstance(answer, Hung):
            text = f"not all could be read: {answer.where} ({answer.why})"
            yield _Finding("memory", _process(pid), text, _NOT_AVAILABLE)
            continue
        if isinstance(answer, str):
            if answer != _AN_AUDIT:
                yield _Finding("memory", _process(pid), answer, _NOT_AVAILABLE)
            continue
        found = Search.of(answer)
        for hit in found.hits:
            holders[_key_of(hit.needle)].add(pid)
        if found.unread:
            text = f"not all could be read: {found.why_unread}"
            yield _Finding("memory", _process(pid), text, _NOT_AVAILABLE)
    for path, key in keys.items():
        identity = key_id(key.public_key()).hex()
        own = {
            keyd.pid
            for keyd in keyds
            if keyd.report is not None
            and any(one[2] == identity and not _is_in_a_token(one[0]) for one in keyd.report.keys)
        }
        # The control: not to find it elsewhere means nothing unless it is found in keyd.
        for pid in sorted(own - holders[path]):
            yield _Finding("memory", path, f"not found in {_process(pid)}", _NOT_AVAILABLE)
        for pid in sorted(own & holders[path]):
            yield _Finding("memory", path, f"in {_process(pid)}, which is to have it", _HOLDS)
        others = sorted(holders[path] - own)
        for pid in others:
            yield _Finding("memory", path, f"in {_process(pid)}", _BROKEN)
        if not others:
            yield _Finding("memory", path, f"in none of {len(pids - own)} others", _HOLDS)


def _is_in_a_token(name: str) -> bool:
    """Whether keyd names a key in a token so, and not a file."""
    return name.startswith("token ")


def _search(pid: int, sought: Sequence[Needle], avoid: frozenset[str], at: At) -> Search | str:
    """What is found in a process; or in words, why nothing is."""
    at(f"/proc/{pid}", "")
    # Whoever is one now may not be one any more after the search.
    audits = auditors.pids()
    try:
        found = search(pid, sought, at=at, avoid=avoid)
    except PermissionError:
        return "cannot be looked into: the kernel does not let this process"
    return _AN_AUDIT if pid in audits | auditors.pids() else found


def _key_of(needle: str) -> str:
    return needle.rpartition(": ")[0]


def _process(pid: int) -> str:
    try:
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        name = "which has ended"
    return f"process {pid} ({name})"


def _files(sought: Sequence[Needle], directories: Iterable[str]) -> Iterator[_Finding]:
    octets = tuple(needle.octets for needle in sought)
    for file in _names(directories):
        opened = _read(file)
        if opened is None:
            continue
        seen, content = opened
        places = occurrences(content, octets, _PLACES)
        for path in sorted({_key_of(sought[which].name) for _, which in places}):
            mode = stat.filemode(seen.st_mode)[1:]
            alone = seen.st_uid == 0 and not seen.st_mode & 0o077
            good = alone or file.startswith(f"{_CREDENTIALS}/")
            text = f"in {file} ({mode}, uid {seen.st_uid}, gid {seen.st_gid})"
            yield _Finding("file", path, text, _HOLDS if good else _BROKEN)


def _read(file: str) -> tuple[os.stat_result, bytes] | None:
    """A regular file that is small enough to be a key's.

    Others may be able to write where it is: no link is followed, and nothing waited for.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    with suppress(OSError):
        if not stat.S_ISREG(os.lstat(file).st_mode):
            return None
        descriptor = os.open(file, flags)
        try:
            seen = os.fstat(descriptor)
            if stat.S_ISREG(seen.st_mode) and seen.st_size <= _LARGEST_FILE:
                return seen, os.read(descriptor, _LARGEST_FILE)
        finally:
            os.close(descriptor)
    return None


def _names(directories: Iterable[str]) -> Iterator[str]:
    """The files on the file system of each directory, and systemd's credentials."""
    for start in (*directories, *map(str, Path(_CREDENTIALS).glob("*"))):
        device = _device(start)
        for directory, below, names in os.walk(start):
            below[:] = [name for name in below if _device(f"{directory}/{name}") == device]
            yield from (f"{directory}/{name}" for name in names)


def _device(path: str) -> int | None:
    try:
        return os.lstat(path).st_dev
    except OSError:
        return None
