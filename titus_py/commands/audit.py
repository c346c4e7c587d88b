"""The command ``titus-py audit``. Run as root; ``titus_py.audit`` says what it trusts.

Exit codes: 0 all promises hold, 1 one does not, 2 there was nothing to audit, or no way to.
"""

import sys
from pathlib import Path

from rich.console import Console

from titus_py.audit.machine import as_json
from titus_py.audit.page import as_html
from titus_py.audit.run import Audit, audit
from titus_py.audit.table import show, show_broken
from titus_py.audit.target import CannotAudit, LivesElsewhere, find_supervisors, find_target

__all__ = ["audit_main"]


def audit_main(pid: int | None, json: bool, html: Path | None, quiet: bool) -> int:
    """Audit the instance with this supervisor, or all instances. Returns the exit code."""
    audits, problems = _audits(pid)
    try:
        if html is not None and audits:
            html.write_text(as_html(audits), encoding="utf-8")
    except OSError as error:
        problems.append(CannotAudit(f"{html}: {error.strerror}"))
    # Instances in containers are no failure if others could be audited.
    elsewhere = [one for one in problems if isinstance(one, LivesElsewhere)] if audits else []
    for problem in problems:
        if problem not in elsewhere:
            print(f"titus-py audit: {problem}", file=sys.stderr)
        elif not quiet:
            print(f"titus-py audit: passed over: {problem}", file=sys.stderr)
    if json:
        print(as_json(audits))
    else:
        console = Console(highlight=False)
        for one in audits:
            (show_broken if quiet else show)(one, console)
    if not all(one.holds for one in audits):
        return 1
    return 0 if audits and len(problems) == len(elsewhere) else 2


def _audits(pid: int | None) -> tuple[list[Audit], list[CannotAudit | OSError]]:
    """The audits, and for each instance that could not be audited, the reason."""
    audits: list[Audit] = []
    problems: list[CannotAudit | OSError] = []
    pids = [pid] if pid is not None else [process.pid for process in find_supervisors()]
    if not pids:
        problems.append(CannotAudit("no running instance is in sight"))
    for each in pids:
        try:
            audits.append(audit(find_target(each)))
        except (CannotAudit, OSError) as error:
            problems.append(error)
    return audits, problems
