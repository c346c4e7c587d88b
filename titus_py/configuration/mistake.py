"""A mistake in the configuration, and the words for it."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from keyd.printable import printable

__all__ = [
    "Mistake",
    "Source",
    "Valid",
    "described",
    "labels_of",
    "nearest",
    "os_reason",
    "text_of",
]


#: Of a key or a reason. Those that quote no long value are shorter.
_MOST_CHARACTERS = 1000


class Mistake(NamedTuple):
    """One thing that is wrong (in a warning, doubtful), and where the operator finds it.

    ``file`` is empty if the configuration came from command-line options. ``key`` is empty if
    the mistake is about the file as a whole. ``line`` counts from 1. ``name`` is the key as
    people read it, with a virtual host's first server name. ``unknown``: nothing may be wrong, but
    what was to look into it failed.
    """

    file: str
    key: str
    reason: str
    line: int | None = None
    name: str = ""
    unknown: bool = False

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file and self.line else self.file
        said = _shortened(self.name or self.key), _shortened(self.reason)
        return printable(": ".join(filter(None, (place, *said))))


def _shortened(text: str) -> str:
    """Without the middle, if it is long: that is a value, and what to do about it comes last."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]}…{text[-half:]}"


class Source(NamedTuple):
    """Where a configuration came from, for naming its mistakes as the operator wrote them.

    ``lines`` are the line numbers of the file's tables and keys. ``labels`` are names that tell
    the tables of an array (``vhost[0]``) apart. ``credentials`` is the directory with the unit's
    systemd credentials. ``files`` are the included files that some of these tables are in.
    """

    file: str
    directory: Path
    options: Mapping[str, str] = {}
    lines: Mapping[str, int] = {}
    labels: Mapping[str, str] = {}
    credentials: Path | None = None
    files: Mapping[str, str] = {}

    @property
    def path(self) -> str:
        """The file's path from any working directory; "" if there is no file."""
        return str(self.directory / Path(self.file).name) if self.file else ""

    def mistake(self, key: str, reason: str) -> Mistake:
        option = self.option(key)
        file = self.included(key) or self.file
        return Mistake(file, option or key, reason, self.line(key), option or self.name(key))

    def included(self, key: str) -> str | None:
        """The included file that the key is in, or should be in; None if it is none of those."""
        table, bracket, _ = key.partition("]")
        return self.files.get(table + bracket)

    def option(self, key: str) -> str | None:
        return self.options.get(re.sub(r"\[\d+\]", "", key))

    def name(self, key: str) -> str:
        """``vhost[17].key`` as in ``vhost "www.example.org": key``."""
        table, bracket, rest = key.partition("]")
        if label := self.labels.get(table + bracket):
            return label + rest.replace(".", ": ", 1)
        return key

    def reference(self, key: str) -> str:
        """The key as another mistake refers to it: the option, or the name with its line."""
        line, file = self.line(key), self.included(key)
        place = f" ({f'{file}:' if file else 'line '}{line})" if line else ""
        return self.option(key) or self.name(key) + place

    def line(self, key: str) -> int | None:
        """The line of the key, or else of the table that it is in, or should be in."""
        key = key.replace('"', "")
        while key and key not in self.lines:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return self.lines.get(key)


def labels_of(tables: Mapping[str, object]) -> dict[str, str]:
    """Names that tell virtual hosts, and listening addresses, apart for people."""
    labels = {}
    for array, key in (("vhost", "sni"), ("listen", "address"), ("tunnel", "listen")):
        found = tables.get(array)
        for index, table in enumerate(found if isinstance(found, list) else []):
            value = table.get(key) if isinstance(table, dict) else None
            first = value[0] if isinstance(value, list) and value else value
            label = array
            if array == "vhost" and isinstance(table, dict) and "certificate_dir" in table:
                label += f" of {described(table['certificate_dir'])}"
            elif isinstance(first, str):
                label += " " + described(first)
            elif array == "vhost" and first is None:
                label += " for any name"
            labels[f"{array}[{index}]"] = label
    return labels


class Valid(NamedTuple):
    """The context for a configuration that was valid before: its files are not looked at again."""


def described(value: object) -> str:
    """A value, or what kind of value it is, for the reason of a mistake."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 60 else value[:60] + "…", ensure_ascii=False)
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a number that large"  # and perhaps too large for str()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list):
        return "an array"
    if isinstance(value, dict):
        return "a table"
    return "a date or time"


def nearest(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1)), None)


def os_reason(error: OSError) -> str:
    reason = error.strerror or str(error)
    return reason[0].lower() + reason[1:]


def text_of(value: object) -> str:
    """A value that has to be a string. Raises ValueError."""
    if not isinstance(value, str):
        # Of a ValueError pydantic makes a mistake; a TypeError it lets through.
        raise ValueError(  # noqa: TRY004
            f"expected a string, not {described(value)}"
        )
    return value
