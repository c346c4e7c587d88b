"""The command ``titus-py audit``. Run as root; see ``titus_py.audit`` for whom it trusts.

Exit codes: 0 all promises hold, 1 one does not, 2 there was nothing to audit, or no way to.
"""

import sys
from pathlib import Path

from rich.console import Console

from keyd.linux.credentials import forbid_core_dumps, hide_memory
from titus_py.audit import CannotAudit, audit, find_supervisors, find_target
from titus_py.audit.machine import as_json
from titus_py.audit.page import as_html
from titus_py.audit.run import Audit
from titus_py.audit.table import show

__all__ = ["audit_main"]


def audit_main(pid: int | None, json: bool, html: Path | None) -> int:
    """Audit the instance with this supervisor, or all instances. Returns the exit code."""
    # The private keys are read here, to be looked for elsewhere.
    forbid_core_dumps()
    hide_memory()
    try:
        audits = _audits(pid)
        if html is not None:
            html.write_text(as_html(audits), encoding="utf-8")
    except (CannotAudit, OSError) as error:
        print(f"titus-py audit: {error}", file=sys.stderr)
        return 2
    if json:
        print(as_json(audits))
    else:
        console = Console(highlight=False)
        for one in audits:
            show(one, console)
    return 0 if all(one.holds for one in audits) else 1


def _audits(pid: int | None) -> list[Audit]:
    pids = [pid] if pid is not None else [process.pid for process in find_supervisors()]
    if not pids:
        raise CannotAudit("no running instance is in sight")
    return [audit(find_target(each)) for each in pids]
