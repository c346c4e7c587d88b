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
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from keyd.inspection import auditors, small_files
from keyd.inspection.files_with_keys import files_with_keys
from keyd.inspection.findings import (
    BROKEN,
    HOLDS,
    NOT_AVAILABLE,
    Finding,
    first_of,
    key_of,
    not_all,
)
from keyd.inspection.key_search import Needle, Search, has_memory, needles, predictable, search
from keyd.inspection.origins import is_of_the_system, may_read, of_root, sees_the_whole_machine
from keyd.inspection.outdated import in_words, outdated
from keyd.inspection.reports import NONE_RUNS, REFUSED, Running, running
from keyd.inspection.status import who_may_ask
from keyd.inspection.watched import At, Hung, Patience, each
from keyd.inspection.worth_reading import Known
from keyd.keys import UnusableKey, load_private_key, read
from keyd.linux.credentials import lock_memory_meanwhile
from keyd.powers import PrivateKey
from keyd.printable import printable
from keyd.reference import key_id

__all__ = ["audit"]

#: Processes come while others are searched, and are searched as well: so many times.
_ROUNDS = 3
#: How long processes that cannot be searched, because something hangs, may take in all. Any user
#: can have very many of them.
_HANGING_SECONDS = 120.0
#: And those that come one after the other, if nothing hangs: so much memory is not read in an hour.
_ROUND_SECONDS = 3600.0
#: It has the keys that it looks for.
_AN_AUDIT = "is another audit's"
_REFUSED = "is refused"


class _Searched:
    """What has come of looking at processes: in whose memory each key is, by the key's path."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.holders: dict[str, set[int]] = {path: set() for path in keys}
        #: Audits' own, which have what they look for; and those of which not all was searched.
        self.audits: set[int] = set()
        self.not_all: set[int] = set()
        #: With root's and the system's services, and with users'.
        self.patience = Patience(_HANGING_SECONDS), Patience(_HANGING_SECONDS)


class _Known(NamedTuple):
    """What there is at the paths that keyds tell of, by pid; 0 is for those of the command.

    Of each socket, who may ask there; which files of the program an update has replaced; of each
    key's file, the octets as characters, or why not.
    """

    askers: dict[int, list[dict[str, str]]]
    outdated: dict[int, list[str] | None]
    contents: dict[str, tuple[str, str]]
    hung: dict[int, Hung]

    def read(self, path: str, field: str) -> bytes:
        """In place of ``keys.read``."""
        if path not in self.contents:
            return _read_key(path, field)
        content, problem = self.contents[path]
        if problem:
            raise UnusableKey(field, problem)
        return content.encode("latin-1")


def audit(arguments: argparse.Namespace) -> int:
    found = running()
    roots = _roots(found)
    keyds = [keyd for keyd in found if keyd.pid in roots or keyd.problem == REFUSED]
    others = [keyd for keyd in found if keyd not in keyds]
    passed_over = list(_passed_over(others))
    if not keyds and not arguments.key:
        print(f"keyd: {NONE_RUNS}. Or name a key to look for, with --key", file=sys.stderr)
        for finding in passed_over:
            print(printable(f"keyd: {finding.subject}: {finding.seen}"), file=sys.stderr)
        return 2
    auditors.join()
    known = _known(keyds, arguments.key)
    findings = [*_askers(keyds, known), *_programs(keyds, known), *_refusals(keyds)]
    findings += [*_tokens(keyds), *passed_over]
    keys: dict[str, PrivateKey] = {}
    findings += _load(keyds, arguments, keys, known)
    sought = [
        Needle(f"{path}: {needle.name}", needle.octets)
        for path, key in keys.items()
        for needle in needles(key)
    ]
    if sought:
        findings += _memory(found, keys, sought)
        findings += files_with_keys(sought, arguments.directory, Patience(_HANGING_SECONDS))
    if arguments.json:
        json.dump([finding._asdict() for finding in findings], sys.stdout, indent=2)
        print()
    else:
        for check, subject, seen, verdict in findings:
            print(printable(f"{verdict:13} {check:7} {subject}: {seen}"))
    return 0 if all(finding.verdict == HOLDS for finding in findings) else 1


def _read_key(path: str, field: str) -> bytes:
    """``keys.read``, of what is said to be a key's file, by a keyd that may be taken over.

    It may be larger than the memory, or a device: to open that may do something.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnusableKey(field, f"{path}: is no regular file")
    except OSError as error:
        raise UnusableKey(field, f"{path}: {error.strerror}") from None
    return read(path, field, small_files.LARGEST)


def _passed_over(keyds: Sequence[Running]) -> Iterator[Finding]:
    """Any user can have a process that looks like a keyd: none of its own is to spoil an audit."""
    for keyd in keyds:
        text = f"passed over: {keyd.user} runs it, and neither root nor a service of the system"
        yield Finding("keyd", keyd.title, f"{text}. Name its keys with --key", HOLDS)


def _known(keyds: Sequence[Running], named: Sequence[str]) -> _Known:
    """Any user can have a process that looks like a keyd, and tell of files on what hangs."""
    of_keyd = {
        keyd.pid: (
            keyd.report.sockets,
            [path for path, *_ in keyd.report.keys if not _is_in_a_token(path)],
        )
        if keyd.report is not None
        else ([], [])
        for keyd in keyds
    }

    def look(pid: int, _: frozenset[str], at: At) -> Any:
        sockets, keys = of_keyd.get(pid, ((), named))
        askers, contents = [], {}
        at(f"/proc/{pid}", "")
        program = outdated(pid) if pid else None
        for path in sockets:
            at(path, "")
            askers.append(who_may_ask(path))
        for path in keys:
            at(path, "")
            try:
                contents[path] = _read_key(path, "key").decode("latin-1"), ""
            except UnusableKey as error:
                contents[path] = "", error.reason
        return askers, program, contents

    known = _Known({}, {}, {}, {})
    for pid, answer in each((*of_keyd, 0), look, os.cpu_count() or 1):
        if isinstance(answer, Hung):
            known.hung[pid] = answer
        else:
            known.askers[pid], known.outdated[pid], contents = answer
            known.contents.update(contents)
    return known


def _askers(keyds: Sequence[Running], known: _Known) -> Iterator[Finding]:
    for keyd in keyds:
        if keyd.report is None:
            yield Finding("asks", keyd.title, keyd.problem, NOT_AVAILABLE)
            continue
        if keyd.pid in known.hung:
            yield Finding("asks", keyd.title, not_all(known.hung[keyd.pid]), NOT_AVAILABLE)
            continue
        for seen in known.askers[keyd.pid]:
            path = seen["path"]
            if "problem" in seen:
                yield Finding("asks", keyd.title, f"{path}: {seen['problem']}", NOT_AVAILABLE)
                continue
            # To connect takes the right to write (unix(7)).
            everybody = seen["mode"][7] == "w"
            who = "everybody" if everybody else f"{seen['user']}, and group {seen['group']}"
            text = f"{who}, at {path} ({seen['mode']})"
            yield Finding("asks", keyd.title, text, BROKEN if everybody else HOLDS)


def _programs(keyds: Sequence[Running], known: _Known) -> Iterator[Finding]:
    """Whether each has the OpenSSL, the Python and the code of its own that are installed."""
    for keyd in keyds:
        # What hangs is named where it is said who may ask.
        old = known.outdated.get(keyd.pid)
        if old is None:
            yield Finding("program", keyd.title, "cannot be looked at", NOT_AVAILABLE)
        elif old:
            yield Finding("program", keyd.title, in_words(old, keyd.pid, keyd.unit), NOT_AVAILABLE)
        else:
            text = "it and its libraries are those that are installed"
            yield Finding("program", keyd.title, text, HOLDS)


def _refusals(keyds: Sequence[Running]) -> Iterator[Finding]:
    """They are shown, and not judged: what they mean is in the log of whoever asked."""
    for keyd in keyds:
        if keyd.report is not None:
            refused = sorted(keyd.report.refused.items())
            text = ", ".join(f"{status} {count}" for status, count in refused) or "nothing"
            if keyd.report.last_refused:
                last = keyd.report.last_refused[-1]
                text += f"; the last one, {last.detail} (process {last.process})"
            yield Finding("refused", keyd.title, text, HOLDS)


def _tokens(keyds: Sequence[Running]) -> Iterator[Finding]:
    """Shown as well: the keys of one that cannot be used are not known, and in it all the same."""
    for keyd in keyds:
        for name, state, _ in keyd.report.tokens if keyd.report is not None else ():
            yield Finding("token", keyd.title, f"{name}: {state}", HOLDS)


# --- where the keys are -----------------------------------------------------------


def _load(
    keyds: Sequence[Running],
    arguments: argparse.Namespace,
    keys: dict[str, PrivateKey],
    known: _Known,
) -> Iterator[Finding]:
    """Load each key once, by the path of its file; a finding for each that cannot be."""
    wanted: dict[str, set[str]] = {path: set() for path in arguments.key}
    for keyd in keyds:
        for path, _, identity in keyd.report.keys if keyd.report is not None else ():
            wanted.setdefault(path, set()).add(identity)
    loaded: set[bytes] = set()
    for path, identities in wanted.items():
        if identities and _is_in_a_token(path):
            yield Finding("key", path, "is in a token, and not looked for", HOLDS)
            continue
        if path not in known.contents:
            yield Finding("key", path, "its file system does not answer", NOT_AVAILABLE)
            continue
        try:
            encrypted = b"ENCRYPTED" in known.read(path, "key")
            passphrase_file = arguments.passphrase_file if encrypted else None
            key = load_private_key(path, passphrase_file, known.read)
        except UnusableKey as error:
            yield Finding("key", path, f"{error}: give it with --key", NOT_AVAILABLE)
            continue
        found = key_id(key.public_key())
        # Several keyds may tell of one file, each of the key that it has read there.
        if identities - {found.hex()}:
            yield Finding("key", path, "is not the key that keyd has any more", NOT_AVAILABLE)
        if (not identities or found.hex() in identities) and found not in loaded:
            loaded.add(found)
            keys[path] = key
            if left_out := predictable(key):
                text = f"what could be anywhere is not looked for: {', '.join(left_out)}"
                yield Finding("key", path, text, NOT_AVAILABLE)
    yield from _not_told(
        keyds, {key_id(keys[one].public_key()) for one in arguments.key if one in keys}
    )
    with suppress(OSError):
        lock_memory_meanwhile()


def _not_told(keyds: Sequence[Running], named: set[bytes]) -> Iterator[Finding]:
    """Of many keys, keyd tells of some. Those that are named may be the others, and no more."""
    for keyd in keyds:
        if keyd.report is not None:
            told = {identity for *_, identity in keyd.report.keys}
            others = sum(one.hex() not in told for one in named)
            there = keyd.report.keys_in_all
            left = there - len(keyd.report.keys) - others
            if left > 0:
                text = f"{left} of {there} keys it does not tell of: name them with --key"
                yield Finding("key", keyd.title, text, NOT_AVAILABLE)


def _memory(
    keyds: Sequence[Running], keys: Mapping[str, PrivateKey], sought: Sequence[Needle]
) -> Iterator[Finding]:
    """Look at the memory of every process, but for this one's."""
    # Of one that has ended, the kernel tells no more.
    roots = _roots(keyds)
    having = {path: _having(keyds, roots, path, key) for path, key in keys.items()}
    searched = _Searched(keys)
    known: dict[int, str] = {}
    for _ in range(_ROUNDS):
        come = _come(known)
        yield from _look_at(set(come), sought, searched)
        known |= come
    pids = set(known)
    # There is no end of those that come: the rest is counted.
    too_late = sum(map(_is_to_be_searched, _come(known)))
    # One that is started again begins meanwhile.
    since = running()
    roots = _roots(since)
    for path, key in keys.items():
        own, holders = having[path], searched.holders[path]
        found = sorted(own & holders)
        # The control: not to find it elsewhere means nothing unless it is found in keyd.
        for pid in sorted(own - holders):
            if not found or Path(f"/proc/{pid}").exists():
                yield Finding("memory", path, f"not found in {_process(pid)}", NOT_AVAILABLE)
        for pid in found:
            yield Finding("memory", path, f"in {_process(pid)}, which is to have it", HOLDS)
        others = sorted(holders - own - _having(since, roots, path, key))
        for pid in others:
            yield Finding("memory", path, f"in {_process(pid)}", BROKEN)
        if not others:
            yield _in_none(path, pids - own - searched.audits, searched.not_all, too_late)


def _in_none(path: str, others: set[int], not_all: set[int], too_late: int) -> Finding:
    """Of those that were searched. Whoever reads this line alone is not to take it for all."""
    text = f"in none of {len(others - not_all)} others"
    if not sees_the_whole_machine():
        text += " of this container"
    if left_out := others & not_all:
        text += f"; {len(left_out)} could not be searched, or not all of them"
    if too_late:
        text += f"; {too_late} that came since were not searched"
    return Finding("memory", path, text, NOT_AVAILABLE if left_out else HOLDS)


def _come(known: Mapping[int, str]) -> dict[int, str]:
    """Other processes than these: by pid, when each began. Another one may have had the pid."""
    others = {int(name) for name in os.listdir("/proc") if name.isdigit()} - {_own_pid()}
    found = {}
    for pid in others:
        with suppress(FileNotFoundError, ProcessLookupError):
            began = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
            if known.get(pid) != began:
                found[pid] = began
    return found


def _own_pid() -> int:
    """As /proc numbers it, which may be mounted in another namespace."""
    return int(os.readlink("/proc/self"))


def _is_to_be_searched(pid: int) -> bool:
    """Audits' processes are not, nor are the kernel's own, and those that have ended."""
    try:
        return not auditors.is_one(pid) and has_memory(pid)
    except PermissionError:
        return True


def _roots(keyds: Iterable[Running]) -> set[int]:
    return of_root(keyd.pid for keyd in keyds)


def _having(keyds: Sequence[Running], roots: set[int], path: str, key: PrivateKey) -> set[int]:
    """Those that are to have this key: of any user's, where the user can read it anyhow."""
    identity = key_id(key.public_key()).hex()
    return {
        keyd.pid
        for keyd in keyds
        if keyd.report is not None
        and any(one[2] == identity and not _is_in_a_token(one[0]) for one in keyd.report.keys)
        and (keyd.pid in roots or may_read(keyd.pid, path))
    }


def _look_at(
    pids: AbstractSet[int], sought: Sequence[Needle], searched: _Searched
) -> Iterator[Finding]:
    """Note in whose memory each key is; a finding for each that could not be searched.

    Root's and the system's services are searched first, and what hangs of users takes nothing of
    the time for what hangs of theirs.
    """
    # Each process that looks has its own.
    known: Known = {}
    refused: list[int] = []
    not_begun: dict[str, list[int]] = {}

    def look(pid: int, avoid: frozenset[str], at: At) -> Search | str:
        return _search(pid, sought, avoid, at, known)

    def answers() -> Iterator[tuple[int, Any]]:
        systems = {pid for pid in pids if is_of_the_system(pid)}
        for kind, patience in zip((systems, pids - systems), searched.patience, strict=True):
            yield from each(
                sorted(kind),
                look,
                os.cpu_count() or 1,
                in_all_seconds=_ROUND_SECONDS,
                patience=patience,
            )

    for pid, answer in answers():
        if answer == _AN_AUDIT:
            searched.audits.add(pid)
        elif answer == _REFUSED:
            refused.append(pid)
        elif isinstance(answer, Hung):
            if not answer.was_not_begun:
                yield Finding("memory", _process(pid), not_all(answer), NOT_AVAILABLE)
            elif Path(f"/proc/{pid}").exists():
                not_begun.setdefault(answer.why, []).append(pid)
            else:
                continue
            searched.not_all.add(pid)
        else:
            found = Search.of(answer)
            for hit in found.hits:
                searched.holders[key_of(hit.needle)].add(pid)
            if found.unread:
                text = f"not all could be read: {found.why_unread}"
                yield Finding("memory", _process(pid), text, NOT_AVAILABLE)
                searched.not_all.add(pid)
    searched.not_all.update(refused)
    if refused:
        yield Finding("memory", _processes(refused), REFUSED, NOT_AVAILABLE)
    for why, left in not_begun.items():
        yield Finding("memory", _processes(left), f"not looked at: {why}", NOT_AVAILABLE)


def _is_in_a_token(name: str) -> bool:
    """Whether keyd names a key in a token so, and not a file."""
    return name.startswith("token ")


def _search(
    pid: int, sought: Sequence[Needle], avoid: frozenset[str], at: At, known: Known
) -> Search | str:
    """What is found in a process; or in words, why nothing is."""
    at(f"/proc/{pid}", "")
    try:
        # Whoever is one now may not be one any more after the search.
        was_one = auditors.is_one(pid)
        found = search(pid, sought, at=at, avoid=avoid, known=known)
        return _AN_AUDIT if was_one or auditors.is_one(pid) else found
    except PermissionError:
        return _REFUSED


def _process(pid: int) -> str:
    try:
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        name = "which has ended"
    return f"process {pid} ({name})"


def _processes(pids: Sequence[int]) -> str:
    return first_of([_process(pid) for pid in pids])
