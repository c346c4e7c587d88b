"""The command ``titus-py check``: every mistake in a configuration, a line each.

Run by the administrator. A child process reads keys and certificates (``configuration.checking``).
"""

import os
import sys
from pathlib import Path

from keyd.printable import printable
from titus_py.commands import outside
from titus_py.commands.routing import commands
from titus_py.configuration import Loaded, load
from titus_py.configuration.checking import Checked, check
from titus_py.configuration.upstreams import unproved_keys
from titus_py.supervisor.privileges import lacking

__all__ = ["check_main", "lacks", "report"]


def lacks(loaded: Loaded) -> bool:
    """Say what this machine lacks to serve the configuration; returns whether it lacks anything.

    If it does, do not go on: checking the files may fail for the same reason.
    """
    reasons = lacking(loaded.configuration)
    if reasons:
        report(loaded)
    for reason in reasons:
        print(f"titus-py: {reason}", file=sys.stderr)
    return bool(reasons)


def report(checked: Checked | Loaded) -> None:
    """Every mistake and warning to standard error, one a line."""
    for mistake in checked.mistakes:
        print(mistake, file=sys.stderr)
    for warning in checked.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def check_main(path: str | Path, credentials: Path | None = None) -> int:
    """The command ``titus-py check``. Returns its exit code: 0, or 2 if there are mistakes."""
    loaded = load(path, credentials)
    # Another user than root cannot tell what root lacks here.
    if not os.geteuid() and lacks(loaded):
        return 2
    checked = check(loaded, only_asked=True)
    report(checked._replace(warnings=[*checked.warnings, *outside.warnings(loaded)]))
    if checked.configuration is None:
        return 2
    print(f"{printable(str(path))}: configuration is fine")
    for line in (*unproved_keys(checked.configuration), *commands(checked.configuration)):
        print(line)
    return 0
