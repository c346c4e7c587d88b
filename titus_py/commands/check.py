"""The command ``titus-py check``: every mistake in a configuration, a line each.

Run by the administrator. What reads keys and certificates is a child (``configuration.checking``).
"""

import os
import sys
from pathlib import Path

from titus_py.configuration import load, printable
from titus_py.configuration.checking import Checked, check
from titus_py.supervisor.privileges import lacking

__all__ = ["check_main", "report"]


def report(checked: Checked) -> None:
    """Every mistake and warning to standard error, one a line."""
    for mistake in checked.mistakes:
        print(mistake, file=sys.stderr)
    for warning in checked.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def check_main(path: str | Path, credentials: Path | None = None) -> int:
    """The command ``titus-py check``. Returns its exit code: 0, or 2 if there are mistakes."""
    loaded = load(path, credentials)
    checked = check(loaded)
    report(checked)
    # Of another user than root, it is not known what root has here.
    reasons = lacking(loaded.configuration) if loaded.configuration and not os.geteuid() else []
    for reason in reasons:
        print(f"titus-py: {reason}", file=sys.stderr)
    if checked.configuration is None or reasons:
        return 2
    print(f"{printable(str(path))}: configuration is fine")
    return 0
