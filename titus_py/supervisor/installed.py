"""Which program is installed, and whether all of it can be loaded. Run by the supervisor.

An upgrade replaces one file after the other. Meanwhile what is installed is of two versions.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import keyd
import titus_py

__all__ = ["Installed", "cannot_be_loaded", "installed"]

#: What tells the files that a process would load now from others. Not the version alone: between
#: two releases, each build has the same.
Installed = tuple[str, frozenset[tuple[str, int, int]]]

_LOADED = ".py", ".so"
#: What the supervisor's children and theirs load; the fork server all by itself.
_PROGRAMS = (
    "keyd.__main__, keyd.serve, keyd.upstream.lender, keyd.upstream.starting",
    "titus_py.parent.life, titus_py.resolver.life, titus_py.metrics.life",
    "titus_py.fork_server.life",
)


def installed() -> Installed:
    """Raises OSError."""
    try:
        named = version("titus-py")
    except (PackageNotFoundError, FileNotFoundError):
        # It is being replaced.
        named = ""
    if not os.access(sys.executable, os.X_OK):
        # Without its Python, it can be started no more than without its files.
        named = ""
    return named, frozenset((*_files(keyd.__file__), *_files(titus_py.__file__)))


def cannot_be_loaded() -> list[str]:
    """The reasons why the programs of the supervisor's children cannot be started."""
    started = [
        subprocess.Popen(
            [sys.executable, "-I", "-c", f"import {modules}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={},
            text=True,
            errors="replace",
        )
        for modules in _PROGRAMS
    ]
    reasons = []
    for process in started:
        _, said = process.communicate()
        if code := process.returncode:
            # The last line of a traceback says most.
            reasons.append((said.strip() or f"it ended with {code}").splitlines()[-1])
    return reasons


def _files(package: str) -> Iterator[tuple[str, int, int]]:
    """Those that a process would load. Raises OSError."""
    for directory, _, names in os.walk(Path(package).parent, onerror=_unless_missing):
        for name in names:
            if name.endswith(_LOADED):
                path = os.path.join(directory, name)
                try:
                    file = os.stat(path)
                except FileNotFoundError:
                    continue
                yield path, file.st_ino, file.st_mtime_ns


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
