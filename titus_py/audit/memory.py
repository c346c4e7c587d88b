"""Checks: what is in a process's memory, and where the private keys are.

Run by ``titus-py audit``, which has no key: it has the memory of the instance's processes
searched by a process that does nothing else (``key_holder``).
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from keyd.inspection.key_search import Search, labels
from titus_py.audit.finding import (
    Check,
    Finding,
    Seen,
    Subject,
    Verdict,
    broken,
    holds,
    not_available,
)
from titus_py.audit.instance import Process, Role, title
from titus_py.audit.observation import Observation, Scene
from titus_py.audit.target import CannotAudit, Target
from titus_py.configuration.helper import Helper, Unanswered
from titus_py.parent.forks import MALLOC

__all__ = ["CHECKS", "look_for_keys", "search_for_keys"]

_KEY_HOLDER = (sys.executable, "-I", "-m", "titus_py.audit.key_holder")
#: Some thousand workers are a few GiB.
_SEARCH_SECONDS = 600.0

#: How many keys of a ``certificate_dir`` are looked for.
_KEYS_OF_A_DIRECTORY = 8
_ENVIRONMENT = re.compile(
    "|".join(
        (
            r"OPENSSL_CONF=/proc/self/fd/\d+",
            "LD_BIND_NOW=1",
            "PYTHONCOERCECLOCALE=0",
            *(re.escape(f"{name}={value}") for name, value in MALLOC.items()),
        )
    ).encode()
)


def _mappings(seen: Observation, scene: Scene) -> Seen:
    secret = {str(path) for path in scene.secret_files.values()}
    wrong = [
        f"{mapping.permissions} {mapping.name} at {mapping.start:#x}"
        for mapping in seen.mappings
        if ("w" in mapping.permissions and "x" in mapping.permissions)
        # The name of a file that was replaced since ends with "(deleted)".
        or mapping.name.removesuffix(" (deleted)") in secret
    ]
    if wrong:
        return broken(", ".join(wrong))
    return holds(f"{len(seen.mappings)} mappings, none of them such")


def _environment(seen: Observation, scene: Scene) -> Seen:
    if seen.process.role is Role.KEYD and not scene.target.started(seen.process):
        return not_available("a service of its own: both are what its administrator made them")
    strange = [word for word in seen.environment if not _ENVIRONMENT.fullmatch(word)]
    if strange:
        variables = ", ".join(word.partition(b"=")[0].decode(errors="replace") for word in strange)
        return broken(f"environment: {variables}")
    if seen.arguments != (title(seen.process.role),):
        shown = b" ".join(seen.arguments).decode(errors="replace")
        return broken(f"arguments: {shown[:200]}")
    names = ", ".join(sorted(word.partition(b"=")[0].decode() for word in seen.environment))
    return holds(
        "of arguments nothing but what it is; "
        + (f"environment: {names}" if names else "no environment")
    )


_STARTED = frozenset(
    {Role.PARENT, Role.FORK_SERVER, Role.KEYD, Role.WORKER, Role.RESOLVER, Role.METRICS}
)

CHECKS = (
    Check(
        "mappings",
        _STARTED | {Role.SUPERVISOR},
        "no memory both writable and executable, no key file mapped",
        "/proc/PID/maps",
        _mappings,
    ),
    Check(
        "environment",
        _STARTED,
        "environment and arguments say nothing of use",
        "/proc/PID/environ, /proc/PID/cmdline",
        _environment,
    ),
)


# --- the private keys -----------------------------------------------------------


def search_for_keys(target: Target, pids: Sequence[int]) -> tuple[list[Search], set[str], int]:
    """Search these processes for the keys of ``Target.key_files``. Raises CannotAudit.

    To look for each of a directory's thousands would take hours: a few stand for all.
    Another process does it, which has the keys (``key_holder``). Returns what it found, the names
    of the keys, and in how many forms it looked for them.
    """
    files = [
        (str(key), phrase and str(phrase)) for key, phrase in target.key_files(_KEYS_OF_A_DIRECTORY)
    ]
    try:
        octets = Helper(_KEY_HOLDER).ask({"files": files, "pids": pids}, _SEARCH_SECONDS)
        answer = json.loads(octets)
    except (Unanswered, ValueError) as error:
        raise CannotAudit(f"the search for the keys failed: {error}") from None
    if "problem" in answer:
        raise CannotAudit(f"cannot tell what to look for in memory: {answer['problem']}")
    found = [Search.of(fields) for fields in answer["found"]]
    return found, set(labels(key for key, _ in files).values()), answer["forms"]


def look_for_keys(
    target: Target, processes: Sequence[Process], stages: dict[int, str]
) -> Iterator[Finding]:
    """Findings for each process, unless it ended during the search and nothing was found in it.

    The newest keyd is the control: the keys must be found in it. Raises CannotAudit.
    """
    keyds = [process for process in processes if process.role is Role.KEYD]
    newest = max(keyds, key=lambda process: process.started, default=None)
    searches, keys, forms = search_for_keys(target, [process.pid for process in processes])
    how = f"/proc/PID/mem, searched for {forms} forms of the keys' numbers"
    if (count := len(target.key_files())) > len(keys):
        how += f"; {len(keys)} of {count} keys, drawn by lot"
    for process, found in zip(processes, searches, strict=True):
        subject = Subject.of(process, stages.get(process.pid, ""))
        if process.role is Role.KEYD:
            seen = _control(found, keys) if keys else _ELSEWHERE
            if process is not newest:
                seen = not_available("serves an earlier configuration, whose keys may be others")
            yield Finding("key", subject, "the private keys are here", how, seen.text, seen.verdict)
            if not found.ended:
                seen = _locked(process.pid, found, target.started(process))
                if (
                    target.configuration.keyd.lock_memory == "try"
                    and seen.verdict is Verdict.BROKEN
                ):
                    seen = not_available(f'{seen.text}: keyd.lock_memory is "try"')
                yield Finding(
                    "locked",
                    subject,
                    "its memory is never swapped out",
                    "VmFlags in /proc/PID/smaps of all that is writable, and of where the keys are",
                    seen.text,
                    seen.verdict,
                )
        elif not found.ended or found.hits:
            seen = _nothing(found) if keys else _ELSEWHERE
            promised = "no private key, nor any number that makes one"
            yield Finding("key", subject, promised, how, seen.text, seen.verdict)


_ELSEWHERE = not_available(
    "all keys are in tokens or on other hosts: no file tells by which numbers to know them"
)


def _control(found: Search, keys: set[str]) -> Seen:
    """The control: not to find the keys elsewhere means nothing unless they are found in keyd."""
    missing = keys - {hit.needle.rpartition(": ")[0] for hit in found.hits}
    if found.ended or missing:
        return broken(
            f"not found: {', '.join(sorted(missing))}: is the file that keyd was started with "
            "still the same?"
        )
    more = ", and in more" if found.often else ""
    return holds(f"found in {len(found.hits)} places{more} of {found.octets >> 20} MiB")


def _nothing(found: Search) -> Seen:
    if found.hits:
        first, *others = found.hits
        more = f", and {len(others)} more" if others else ""
        return broken(f"{first}{more}{' and more' if found.often else ''}")
    if found.unread:
        # Nothing that an instance's process has is like that: something may be hidden there.
        return broken(f"not all could be read: {found.why_unread}")
    return holds(f"{found.octets >> 20} MiB read, none found")


#: In VmFlags (proc_pid_smaps(5)): locked; and droppable, which is the C library's memory for
#: random octets: the kernel drops it rather than swap it out.
_NEVER_SWAPPED = frozenset(("lo", "dp"))


def _locked(pid: int, found: Search, started: bool) -> Seen:
    """``started``: by titus-py, as root, which may lock present memory whatever the limit."""
    locked = loose = 0
    exposed = []
    for start, end, permissions, flags in _flagged_mappings(pid):
        if not _NEVER_SWAPPED.isdisjoint(flags):
            locked += end - start
            continue
        exposed += [hit for hit in found.hits if start <= hit.address < end]
        if "w" in permissions:
            loose += end - start
    text = f"{locked >> 10} KiB locked"
    limit = re.search(r"Max locked memory +(\S+) +(\S+)", Path(f"/proc/{pid}/limits").read_text())
    most = limit[2] if limit else "unlimited"
    if exposed and not started and most != "unlimited":
        return not_available(
            f"{text}, as RLIMIT_MEMLOCK is {most}: LimitMEMLOCK=infinity, where it has an effect"
        )
    if exposed:
        return broken(f"{text}, but not {exposed[0].mapping}, where {exposed[0].needle} is")
    if found.often and loose:
        return not_available(f"{text}; {found.often[0]} is in more places than were looked at")
    if loose:
        text += f", and all that has the keys; {loose >> 10} KiB that came later is not"
        if most != "unlimited":
            return not_available(
                f"{text}: it was started without CAP_SYS_RESOURCE, which allows it"
            )
        return broken(text)
    return holds(text)


def _flagged_mappings(pid: int) -> Iterator[tuple[int, int, str, list[str]]]:
    start = end = 0
    permissions = ""
    # A file's name may have what Python takes for the end of a line.
    text = Path(f"/proc/{pid}/smaps").read_bytes().decode(errors="replace")
    for line in text.split("\n"):
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            addresses, permissions = line.split(maxsplit=2)[:2]
            start, end = (int(address, 16) for address in addresses.split("-"))
        elif line.startswith("VmFlags:"):
            yield start, end, permissions, line.split()[1:]
