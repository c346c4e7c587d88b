"""A mistake in the configuration, and the words for it."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["Mistake", "Source", "described", "nearest", "os_reason", "printable"]


class Mistake(NamedTuple):
    """One thing that is wrong, or for warnings doubtful, and where the operator finds it.

    ``file`` is empty where the configuration came from command-line options, ``key`` where
    the mistake is about the file as a whole.
    """

    file: str
    key: str
    reason: str

    def __str__(self) -> str:
        return printable(": ".join(part for part in self if part))


def printable(text: str) -> str:
    """One line that any terminal can take, whatever a file or its name holds."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Source(NamedTuple):
    """Where a configuration came from, for naming its mistakes as the operator wrote them."""

    file: str
    directory: Path
    options: Mapping[str, str] = {}

    def mistake(self, key: str, reason: str) -> Mistake:
        return Mistake(self.file, self.name(key), reason)

    def name(self, key: str) -> str:
        return self.options.get(re.sub(r"\[\d+\]", "", key), key)


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
