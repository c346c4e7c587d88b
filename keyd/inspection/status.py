"""``keyd status``: what keys a keyd has, who may ask it, what it did and refused.

Run by root. It reads what each keyd says of itself (``reports``), and looks at the sockets' files.
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
from typing import Any

from keyd.inspection.origins import of_root
from keyd.inspection.reports import NONE_RUNS, Running, running
from keyd.inspection.watched import At, Hung, each
from keyd.printable import printable
from keyd.status_page import Report
from keyd.tally import LATENCY_BOUNDS

__all__ = ["status", "who_may_ask"]

#: How long all sockets' files may take together. There may be any number of them, on what hangs.
_IN_ALL_SECONDS = 60.0


def status(arguments: argparse.Namespace) -> int:
    """Returns 0, 1 if a keyd has no report, 2 if there is none; with metrics, always 0."""
    found = running()
    if arguments.metrics:
        # They say it themselves. What is written before another command is to be valid.
        sys.stdout.writelines(f"{line}\n" for line in _metrics(found))
        return 0
    askers = _askers(found)
    if arguments.json:
        json.dump([_as_object(one, askers) for one in found], sys.stdout, indent=2)
        print()
    else:
        lines = (line for one in found for line in _lines(one, askers))
        sys.stdout.writelines(f"{printable(line)}\n" for line in lines)
    if not found:
        print(f"keyd: {NONE_RUNS}", file=sys.stderr)
        return 2
    return 1 if any(one.report is None for one in found) else 0


def _askers(found: Sequence[Running]) -> dict[int, list[dict[str, str]]]:
    """Of each keyd, by pid, whom the files of its sockets let connect.

    Any user can have processes that look like a keyd, and tell of sockets on what hangs: so theirs
    are looked at last.
    """
    sockets = {one.pid: one.report.sockets for one in found if one.report is not None}
    roots = of_root(sockets)
    pids = sorted(sockets, key=lambda pid: pid not in roots)

    def look(pid: int, _: frozenset[str], at: At) -> list[dict[str, str]]:
        seen = []
        for path in sockets[pid]:
            at(path, "")
            seen.append(who_may_ask(path))
        return seen

    askers = {}
    for pid, answer in each(pids, look, os.cpu_count() or 1, in_all_seconds=_IN_ALL_SECONDS):
        if isinstance(answer, Hung):
            problem = f"not looked at, because of {answer.where} ({answer.why})"
            answer = [{"path": path, "problem": problem} for path in sockets[pid]]
        askers[pid] = answer
    return askers


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


def _as_object(one: Running, askers: Mapping[int, list[dict[str, str]]]) -> dict[str, Any]:
    common = {"pid": one.pid, "user": one.user, "unit": one.unit}
    if one.report is None:
        return {**common, "problem": one.problem}
    report = one.report
    return {
        **common,
        "command": report.command,
        "started": report.started,
        "sockets": askers[one.pid],
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


def _lines(one: Running, askers: Mapping[int, list[dict[str, str]]]) -> Iterator[str]:
    if one.report is None:
        yield f"{one.title}: process {one.pid} of {one.user}: {one.problem}"
        return
    report = one.report
    yield f"{one.title}: process {one.pid} of {one.user}, since {_time(report.started)}"
    for name, kind, fingerprint in report.keys:
        yield f"  key      {name}  {kind}  {fingerprint}"
    if report.keys_in_all > len(report.keys):
        yield f"  keys     {report.keys_in_all} in all"
    for token, state, (signed, failed, logins) in report.tokens:
        yield f"  token    {token}  {state}  (signed {signed}, failed {failed}, logins {logins})"
    for seen in askers[one.pid]:
        if "problem" in seen:
            yield f"  may ask  {seen['path']}: {seen['problem']}"
        else:
            yield f"  may ask  {seen['path']}  {seen['mode']}  {seen['user']}:{seen['group']}"
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
    for one in found:
        if (report := one.report) is not None:
            label = _label(report.sockets[0] if report.sockets else one.unit, one.user)
            if label not in of_each or of_each[label].started < report.started:
                of_each[label] = report
    reports = of_each.items()
    yield from _head("keyd_without_report", "gauge", "Processes like keyd that say nothing.")
    yield f"keyd_without_report {sum(one.report is None for one in found)}"
    yield from _head("keyd_start_time_seconds", "gauge", "When keyd was started, since 1970.")
    for keyd, report in reports:
        yield f"keyd_start_time_seconds{{{keyd}}} {report.started}"
    yield from _head("keyd_keys", "gauge", "Private keys that keyd has.")
    for keyd, report in reports:
        yield f"keyd_keys{{{keyd}}} {report.keys_in_all}"
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
