"""Reads a TOML file: its tables, and the lines that they are on.

``tomllib`` reads the file. It tells a line only for the first thing that is not TOML, so a small
scanner finds the line of each table and key. The scanner knows strings, comments and brackets.
"""

import codecs
import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Document", "NotTOML", "key_text", "lines_of", "read"]


class Document(NamedTuple):
    tables: dict[str, Any]
    #: The line of each table (``worker``, ``vhost[0]``) and key (``vhost[0].key``), from 1.
    lines: Mapping[str, int]


class NotTOML(Exception):
    """What is wrong with the text, and on which line if that is known."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line


#: How tomllib's messages begin, and for each the slip that is behind it, in plain words.
_NO_CLOSING_QUOTE = "a string has no closing quote"
_SLIPS = {
    "Illegal character '\\n'": _NO_CLOSING_QUOTE,
    "Found invalid character '\\n'": _NO_CLOSING_QUOTE,
    "Unterminated string": _NO_CLOSING_QUOTE,
    "Expected \"'": _NO_CLOSING_QUOTE,
    "Unescaped '\\'": "a backslash within \"…\" is written twice (or the string as '…')",
    "Invalid value": 'expected "text in quotes", a whole number, true, false, or a list of these '
    "in brackets",
    "Expected newline": "something follows the value: is it text that needs quotes around it?",
    "Expected '='": "expected key = value",
    "Invalid statement": "expected [table], [[table]] or key = value",
    "Unclosed array": "a list has no closing bracket, or no comma between two of its values",
    "Cannot declare": "this table is there already; of those headed [[listen]] and [[vhost]], in "
    "double brackets, there may be several",
    "Cannot overwrite": "this is there already; of tables headed [[listen]] and [[vhost]], in "
    "double brackets, there may be several",
}

_PART = r"""(?:[A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*')"""
_KEY = rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*"
_HEAD = re.compile(rf"[ \t]*(?:(\[\[?)[ \t]*({_KEY})|({_KEY})[ \t]*=)")
_PARTS = re.compile(_PART)
_MOST_PARTS = 32
#: Strings of several lines; what may be a key, as strings of one line may; such strings without
#: an end; comments, brackets, the end of a line, and what is between them.
_TOKEN = re.compile(
    r'''"""(?:\\.|[^\\])*?(?:"{3,5}|\Z)|\'\'\'.*?(?:'{3,5}|\Z)'''
    rf"""|(?P<key>{_KEY})|"(?:\\.|[^"\\\n])*|'[^'\n]*"""
    r"""|#[^\n]*|[\[\]{}\n]|[^"'#\[\]{}\nA-Za-z0-9_-]+""",
    re.DOTALL,
)


def read(content: bytes) -> Document:
    """Raises NotTOML."""
    try:
        # Some editors begin a file with a byte order mark.
        text = content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise NotTOML("is not UTF-8 text: save the file as UTF-8", line) from None
    # Before tomllib: with a key of very many parts, that takes minutes.
    lines = lines_of(text)
    try:
        return Document(tomllib.loads(text), lines)
    except tomllib.TOMLDecodeError as error:
        raise _explained(str(error), text) from None
    except ValueError:  # int(), of thousands of digits
        raise NotTOML("not valid TOML: an integer too long to read") from None
    except RecursionError:
        raise NotTOML("not valid TOML: arrays or tables nested too deeply") from None


def key_text(name: str) -> str:
    """One part of a key, as it is written: in quotes, where it needs them."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)


def _explained(said: str, text: str) -> NotTOML:
    reason, _, place = said.removesuffix(")").rpartition(" (at ")
    slip = next((slip for start, slip in _SLIPS.items() if reason.startswith(start)), reason)
    position = re.fullmatch(r"line ([0-9]+), column ([0-9]+)", place)
    if position is None:
        # "at end of document": something further up was not closed.
        line = _line_of_open_string(text) or max(lines_of(text).values(), default=None)
        return NotTOML(f"not valid TOML: {slip}", line)
    line = int(position[1])
    heading = re.match(rf"[ \t]*\[\[[ \t]*({_PART})[ \t]*\]\]", text.split("\n")[line - 1])
    if heading and reason.startswith("Cannot"):
        name = heading[1]
        slip = (
            f"above this [[{name}]], there is a [{name}] in single brackets, or a table within one "
            f"([{name}.…]): what is within a [[{name}]] goes below it"
        )
    return NotTOML(f"not valid TOML: {slip} (column {position[2]})", line)


def _line_of_open_string(text: str) -> int | None:
    for token in _TOKEN.finditer(text):
        # What may be a key is closed, and may end otherwise than it begins.
        if token["key"] is None and (quote := re.match("\"\"\"|'''|[\"']", token[0])):
            closed = token[0].endswith(quote[0]) and len(token[0]) >= 2 * len(quote[0])
            if not closed:
                return text.count("\n", 0, token.start()) + 1
    return None


def lines_of(text: str) -> dict[str, int]:
    """The lines of the tables and keys in a TOML document (https://toml.io/en/v1.0.0).

    Raises NotTOML for a key of more parts than any that there is.
    """
    lines: dict[str, int] = {}
    #: How many tables of each array there were so far.
    counts: dict[str, int] = {}
    table, line, at = "", 1, 0
    while at < len(text):
        end = _end_of_statement(text, at, line)
        if head := _HEAD.match(text, at):
            brackets, heading, key = head.groups()
            path = ".".join(part.strip("\"'") for part in _PARTS.findall(heading or key))
            if brackets:
                path = table = _indexed(path, brackets == "[[", counts)
            elif table:
                path = f"{table}.{path}"
            lines.setdefault(path, line)
        line += text.count("\n", at, end)
        at = end
    return lines


def _indexed(heading: str, is_array: bool, counts: dict[str, int]) -> str:
    """``vhost.certificates`` as ``vhost[0].certificates[1]``; counts the table if it is another."""
    path = ""
    *outer, last = heading.split(".")
    for part in outer:
        path += part
        if path in counts:
            path += f"[{counts[path] - 1}]"
        path += "."
    path += last
    if is_array:
        counts[path] = counts.get(path, 0) + 1
    return f"{path}[{counts[path] - 1}]" if path in counts else path


def _end_of_statement(text: str, at: int, line: int) -> int:
    """The offset of the line after the statement that begins at ``at``: lists may take several.

    It begins on ``line``. Raises NotTOML for a key of too many parts, also within braces.
    """
    depth = 0
    for token in _TOKEN.finditer(text, at):
        if (key := token["key"]) is not None:
            parts = len(_PARTS.findall(key))
            if parts > _MOST_PARTS:
                line += text.count("\n", at, token.start())
                raise NotTOML(f"a key of {parts} parts: no setting has so many", line)
        elif token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
        elif token[0] == "\n" and depth <= 0:
            return token.end()
    return len(text)
