"""``keyd status``: what keys a keyd has, who may ask it, what it did and refused.

Run by root. It reads what each keyd says of itself (``reports``), and looks at the sockets' files,
and whether an update has replaced those of its program.
"""

import argparse
import grp
import json
import os
import pwd
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from keyd.inspection.origins import of_root
from keyd.inspection.outdated import in_words, outdated
from keyd.inspection.reports import NONE_RUNS, Running, running
from keyd.inspection.watched import At, Hung, each
from keyd.printable import printable
from keyd.status_page import Report
from keyd.tally import LATENCY_BOUNDS

__all__ = ["status", "who_may_ask"]

#: How long all sockets' files may take together. There may be any number of them, on what hangs.
_IN_ALL_SECONDS = 60.0
_SOCKETS, _PROGRAM = "sockets", "program"


class _Seen(NamedTuple):
    """Of each keyd, by pid: whom the files of its sockets let connect; which files of its program
    an update has replaced, or in words why that was not looked at.
    """

    askers: dict[int, list[dict[str, str]]]
    outdated: dict[int, list[str] | str]


def status(arguments: argparse.Namespace) -> int:
    """Returns 0, 1 if a keyd has no report, 2 if there is none; with metrics, always 0."""
    found = running()
    if arguments.metrics:
        # They say it themselves. What is written before another command is to be valid.
        sys.stdout.writelines(f"{line}\n" for line in _metrics(found))
        return 0
    seen = _look(found)
    if arguments.json:
        json.dump([_as_object(one, seen) for one in found], sys.stdout, indent=2)
        print()
    else:
        lines = (line for one in found for line in _lines(one, seen))
        sys.stdout.writelines(f"{printable(line)}\n" for line in lines)
    if not found:
        print(f"keyd: {NONE_RUNS}", file=sys.stderr)
        return 2
    return 1 if any(one.report is None for one in found) else 0


def _look(found: Sequence[Running], *kinds: str) -> _Seen:
    """Any user can have processes that look like a keyd, tell of sockets on what hangs, and hang
    themselves: so theirs are looked at last.
    """
    sockets = {one.pid: one.report.sockets if one.report is not None else [] for one in found}
    roots = of_root(sockets)
    pids = sorted(sockets, key=lambda pid: pid not in roots)

    def look(what: list[Any], _: frozenset[str], at: At) -> Any:
        kind, pid = what
        if kind == _PROGRAM:
            at(f"/proc/{pid}", "")
            answer = outdated(pid)
            return "cannot be looked at" if answer is None else answer
        seen = []
        for path in sockets[pid]:
            at(path, "")
            seen.append(who_may_ask(path))
        return seen

    seen = _Seen({}, {})
    items = [(kind, pid) for pid in pids for kind in kinds or (_SOCKETS, _PROGRAM)]
    for (kind, pid), answer in each(
        items, look, os.cpu_count() or 1, in_all_seconds=_IN_ALL_SECONDS
    ):
        problem = ""
        if isinstance(answer, Hung):
            problem = f"not looked at, because of {answer.where} ({answer.why})"
        if kind == _PROGRAM:
            seen.outdated[pid] = problem or answer
        elif problem:
            seen.askers[pid] = [{"path": path, "problem": problem} for path in sockets[pid]]
        else:
            seen.askers[pid] = answer
    return seen


def who_may_ask(path: str) -> dict[str, str]:
    """Whom the socket's file lets connect, besides root."""
    try:
        seen = Path(path).lstat()
    except OSError as error:
        return {"path": path, "problem": error.strerror or "cannot be looked at"}
    return {
        "path": path,
        "mode": stat.filemode(seen.st_mode)[1:],
        "user": _name(pwd.getpwuid, seen.st_uid),
        "group": _name(grp.getgrgid, seen.st_gid),
    }


def _name(look_up: Any, number: int) -> str:
    try:
        return str(look_up(number)[0])
    except KeyError:
        return str(number)


def _as_object(one: Running, seen: _Seen) -> dict[str, Any]:
    old = seen.outdated[one.pid]
    common = {
        "pid": one.pid,
        "user": one.user,
        "unit": one.unit,
        "outdated": old if isinstance(old, list) else None,
    }
    if one.report is None:
        return {**common, "problem": one.problem}
    report = one.report
    return {
        **common,
        "command": report.command,
        "started": report.started,
        "sockets": seen.askers[one.pid],
        "keys": [
            {"name": name, "kind": kind, "fingerprint": fingerprint}
            for name, kind, fingerprint in report.keys
        ],
        "keys_in_all": report.keys_in_all,
        "tokens": [
            {"token": token, "state": state, "signed": signed, "failed": failed, "logins": logins}
            for token, state, (signed, failed, logins) in report.tokens
        ],
        "signed": report.signed,
        "decrypted": report.decrypted,
        "refused": report.refused,
        "last_refused": [refused._asdict() for refused in report.last_refused],
    }


def _lines(one: Running, seen: _Seen) -> Iterator[str]:
    old = seen.outdated[one.pid]
    program = [old] if isinstance(old, str) else [in_words(old, one.pid, one.unit)] if old else []
    if one.report is None:
        yield f"{one.title}: process {one.pid} of {one.user}: {one.problem}"
        yield from (f"  program  {words}" for words in program)
        return
    report = one.report
    yield f"{one.title}: process {one.pid} of {one.user}, since {_time(report.started)}"
    yield from (f"  program  {words}" for words in program)
    for name, kind, fingerprint in report.keys:
        yield f"  key      {name}  {kind}  {fingerprint}"
    if report.keys_in_all > len(report.keys):
        yield f"  keys     {report.keys_in_all} in all"
    for token, state, (signed, failed, logins) in report.tokens:
        yield f"  token    {token}  {state}  (signed {signed}, failed {failed}, logins {logins})"
    for asker in seen.askers[one.pid]:
        if "problem" in asker:
            yield f"  may ask  {asker['path']}: {asker['problem']}"
        else:
            yield f"  may ask  {asker['path']}  {asker['mode']}  {asker['user']}:{asker['group']}"
    yield f"  signed   {report.signed}"
    yield f"  decrypted {report.decrypted}"
    yield f"  refused  {_refusals(report)}"
    for at, status, detail, process in report.last_refused:
        yield f"    {_time(at)}  {status}: {detail} (process {process})"


def _refusals(report: Report) -> str:
    total = sum(report.refused.values())
    each = ", ".join(f"{status} {count}" for status, count in sorted(report.refused.items()))
    return f"{total} ({each})" if total else "0"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(min(seconds, 253_402_300_799)))


# --- metrics --------------------------------------------------------------------


def _metrics(found: Sequence[Running]) -> Iterator[str]:
    """Prometheus' text format, of those that have a report; by user and first socket.

    A user can have pages that say the same: the one that was started last counts.
    """
    of_each: dict[str, Report] = {}
    pids: dict[str, int] = {}
    for one in found:
        if (report := one.report) is not None:
            label = _label(report.sockets[0] if report.sockets else one.unit, one.user)
            if label not in of_each or of_each[label].started < report.started:
                of_each[label], pids[label] = report, one.pid
    reports = of_each.items()
    yield from _head("keyd_without_report", "gauge", "Processes like keyd that say nothing.")
    yield f"keyd_without_report {sum(one.report is None for one in found)}"
    yield from _head("keyd_start_time_seconds", "gauge", "When keyd was started, since 1970.")
    for keyd, report in reports:
        yield f"keyd_start_time_seconds{{{keyd}}} {report.started}"
    yield from _head("keyd_keys", "gauge", "Private keys that keyd has.")
    for keyd, report in reports:
        yield f"keyd_keys{{{keyd}}} {report.keys_in_all}"
    yield from _head("keyd_outdated_files", "gauge", "Of its program, replaced by an update since.")
    roots = of_root(pids.values())
    seen = _look([one for one in found if one.pid in roots], _PROGRAM)
    for keyd, pid in pids.items():
        if isinstance(old := seen.outdated.get(pid), list):
            yield f"keyd_outdated_files{{{keyd}}} {len(old)}"
    yield from _of_tokens(of_each)
    yield from _head("keyd_operations_total", "counter", "What was done with keys.")
    for keyd, report in reports:
        for operation, count in (("sign", report.signed), ("decrypt", report.decrypted)):
            yield f'keyd_operations_total{{{keyd},operation="{operation}"}} {count}'
    yield from _head("keyd_refused_total", "counter", "Requests that were refused, by reason.")
    for keyd, report in reports:
        for status, count in sorted(report.refused.items()):
            yield f'keyd_refused_total{{{keyd},status="{status}"}} {count}'
    yield from _head("keyd_operation_seconds", "histogram", "How long operations took.")
    for keyd, report in reports:
        bounds = [*map(str, LATENCY_BOUNDS), "+Inf"]
        for bound, count in zip(bounds, report.seconds, strict=False):
            yield f'keyd_operation_seconds_bucket{{{keyd},le="{bound}"}} {count}'
        yield f"keyd_operation_seconds_sum{{{keyd}}} {report.seconds_sum}"
        yield f"keyd_operation_seconds_count{{{keyd}}} {report.signed + report.decrypted}"


def _of_tokens(of_each: Mapping[str, Report]) -> Iterator[str]:
    """Two tokens may have the same name: then both are counted together, and have to be ready."""
    ready: dict[str, bool] = {}
    counts: dict[str, list[int]] = {}
    for keyd, report in of_each.items():
        for token, state, counted in report.tokens:
            labels = f'{keyd},token="{_escaped(token)}"'
            ready[labels] = ready.get(labels, True) and state == "ready"
            counts[labels] = counted
    yield from _head("keyd_token_ready", "gauge", "Whether all keys in a token can be used.")
    for labels, is_ready in ready.items():
        yield f"keyd_token_ready{{{labels}}} {int(is_ready)}"
    yield from _head("keyd_token_operations_total", "counter", "What a token was asked to sign.")
    for labels, (signed, failed, _) in counts.items():
        yield f'keyd_token_operations_total{{{labels},result="done"}} {signed}'
        yield f'keyd_token_operations_total{{{labels},result="failed"}} {failed}'
    yield from _head("keyd_token_logins_total", "counter", "Logins, one after each failure.")
    for labels, (_, _, logins) in counts.items():
        yield f"keyd_token_logins_total{{{labels}}} {logins}"


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _label(socket: str, user: str) -> str:
    return f'socket="{_escaped(socket)}",user="{_escaped(user)}"'


def _escaped(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace('"', '\\"')
