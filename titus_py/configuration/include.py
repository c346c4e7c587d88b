"""The files that a configuration includes: their tables follow its own, as if they were in it.

Run by the supervisor and by the commands.
"""

import glob
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from titus_py.configuration import toml
from titus_py.configuration.mistake import Mistake, Source, labels_of, os_reason

__all__ = ["Unreadable", "include", "read_file"]

_MAX_FILE_OCTETS = 4 * 1024 * 1024
#: The tables that an included file may have.
_ARRAYS = ("listen", "vhost", "tunnel")


class Unreadable(Exception):
    """A file is no TOML document, or cannot be read; ``line`` is where that shows, if known."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line


class Included(NamedTuple):
    """All tables together, where each of them is, and the files that were included."""

    tables: dict[str, Any]
    source: Source
    files: list[str]
    mistakes: list[Mistake]
    warnings: list[Mistake]


def read_file(path: str | Path) -> toml.Document:
    """Raises Unreadable."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE_OCTETS + 1)
    except OSError as error:
        raise Unreadable(os_reason(error)) from None
    except ValueError:
        raise Unreadable("a file name cannot hold a NUL character") from None
    if len(content) > _MAX_FILE_OCTETS:
        raise Unreadable(f"is longer than {_MAX_FILE_OCTETS} octets")
    try:
        return toml.read(content)
    except toml.NotTOML as error:
        raise Unreadable(error.reason, error.line) from None


def include(tables: dict[str, Any], source: Source) -> Included:
    """Add the tables of the files that ``include`` names.

    ``source`` has the lines of the file itself. What is wrong with the setting itself is found
    where all settings are checked.
    """
    together = {**tables}
    lines, files = dict(source.lines), dict(source.files)
    mistakes: list[Mistake] = []
    warnings: list[Mistake] = []
    patterns = tables.get("include")
    found = [*_matching(patterns if isinstance(patterns, list) else [], source, warnings)]
    for path in found:
        try:
            if not os.path.isfile(path):
                raise Unreadable("is no file")
            added, their_lines = read_file(path)
        except Unreadable as error:
            mistakes.append(Mistake(path, "", error.reason, error.line))
            continue
        counts = {name: len(_array(together, name) or ()) for name in _ARRAYS}
        for name, value in added.items():
            before = _array(together, name)
            if name not in _ARRAYS or not isinstance(value, list) or before is None:
                reason = (
                    "an included file has only tables headed [[listen]], [[vhost]] and [[tunnel]]"
                )
                mistakes.append(Mistake(path, name, reason, their_lines.get(name)))
                continue
            together[name] = [*before, *value]
            for index in range(len(before), len(before) + len(value)):
                files[f"{name}[{index}]"] = path
        lines |= {_moved(key, counts): line for key, line in their_lines.items() if "[" in key}
    source = source._replace(lines=lines, files=files, labels=labels_of(together))
    return Included(together, source, found, mistakes, warnings)


def _matching(patterns: list[object], source: Source, warnings: list[Mistake]) -> Iterator[str]:
    """The files that match, each once: in the order of the patterns, and sorted for each."""
    seen: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern or "\0" in pattern:
            continue
        found = sorted(glob.glob(os.path.join(source.directory, pattern)))
        if not found:
            warnings.append(source.mistake("include", f"{pattern}: no file matches"))
        yield from (path for path in found if path not in seen)
        seen.update(found)


def _array(tables: Mapping[str, Any], name: str) -> list[Any] | None:
    """The tables that there are already; None if something else is in their place."""
    found = tables.get(name, [])
    return found if isinstance(found, list) else None


def _moved(key: str, counts: Mapping[str, int]) -> str:
    """``vhost[0].key`` of an included file, by its place among all tables."""
    return re.sub(
        r"^(\w+)\[(\d+)\]",
        lambda found: f"{found[1]}[{int(found[2]) + counts.get(found[1], 0)}]",
        key,
    )
