"""The commands ``keyd status`` and ``keyd audit``: their options. Run by root, and by every keyd.

What they do is imported when one of them is run: a keyd that serves has no use for it.
"""

import argparse
from typing import Any

__all__ = ["DIRECTORIES", "add_commands"]

#: Where files with a key are looked for, unless told otherwise.
DIRECTORIES = ("/etc", "/root", "/run", "/srv", "/usr/local/etc", "/var/backups")


def add_commands(commands: Any) -> None:
    status = commands.add_parser(
        "status",
        help="show each keyd of its own: keys, who may ask, what was done and refused, "
        "whether it is to be restarted after an update",
    )
    form = status.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as an array with an object for each")
    form.add_argument(
        "--metrics",
        action="store_true",
        help="as text for Prometheus' textfile collector",
    )
    status.set_defaults(run=_status)

    audit = commands.add_parser(
        "audit",
        help="where each key is: in which processes' memory, in which files; and who may ask",
        description="Exit code 0: each key is in its keyd's memory and in no other, its files are "
        "root's alone, and not everybody may ask. 1: it is not so, or could not be looked at. 2: "
        "there is nothing to look at.",
    )
    audit.add_argument("--json", action="store_true", help="as an array of findings")
    audit.add_argument(
        "--key",
        action="append",
        default=[],
        metavar="FILE",
        help="a key to look for, besides those that keyds were started with",
    )
    audit.add_argument("--passphrase-file", metavar="FILE", help="of the keys that are encrypted")
    audit.add_argument(
        "--directory",
        action="append",
        metavar="DIRECTORY",
        help=f"where to look for files with a key (default: {', '.join(DIRECTORIES)})",
    )
    audit.set_defaults(run=_audit)


def _status(arguments: argparse.Namespace) -> int:
    from keyd.inspection.status import status

    return status(arguments)


def _audit(arguments: argparse.Namespace) -> int:
    from keyd.inspection.audit import audit

    return audit(arguments)
