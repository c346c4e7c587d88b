"""Explains pydantic's errors in the words of a configuration file."""

import re
from collections.abc import Sequence

from pydantic_core import ErrorDetails

from titus_py.configuration.mistake import Mistake, Source, described, nearest
from titus_py.configuration.other_words import in_other_words
from titus_py.configuration.tables import TABLES, Configuration, Table, table_of
from titus_py.configuration.toml import key_text

__all__ = ["explained"]


def explained(details: ErrorDetails, source: Source) -> Mistake:
    """The mistake behind one of pydantic's errors."""
    location = details["loc"]
    key = ""
    for part in location:
        if isinstance(part, int):
            key += f"[{part}]"
        else:
            key += f".{key_text(part)}" if key else key_text(part)
    unknown = details["type"] == "extra_forbidden"
    return source.mistake(key, _unknown_key(details) if unknown else _reason(details, key))


def _unknown_key(details: ErrorDetails) -> str:
    *path, key = details["loc"]
    table = _table(path)
    is_table = isinstance(details["input"], dict) or (
        isinstance(details["input"], list) and dict in map(type, details["input"])
    )
    kind = "table" if is_table else "key"
    key = str(key)
    meant = nearest(key.lower().replace("-", "_"), table.model_fields)
    homes = [_heading(name) for name, model in TABLES.items() if key in model.model_fields]
    if path and (other := in_other_words(key, str(path[0]))):
        return f"unknown {kind}: {other}"
    if homes and not (path and meant):
        return f"unknown {kind}: it belongs in {' or '.join(homes)}"
    if homes:
        return f"unknown {kind}: did you mean {meant}? {key} belongs in {' or '.join(homes)}"
    if meant:
        return f"unknown {kind}: did you mean {meant}?"
    return f"unknown {kind}: known here are {', '.join(table.model_fields)}"


def _table(path: Sequence[str | int]) -> type[Table]:
    """The model of the table at this place, which may be within another table."""
    table: type[Table] = Configuration
    for part in path:
        if isinstance(part, str):
            table = table_of(table.model_fields[part]) or table
    return table


def _reason(details: ErrorDetails, key: str) -> str:
    found = described(details["input"])
    limits = details.get("ctx", {})
    match details["type"]:
        case "value_error":
            return str(limits["error"])
        case "missing":
            return f"at least one {_heading(key)} is needed" if key in TABLES else "is missing"
        case "tuple_type":
            heading = _heading(key)
            if heading.startswith("[["):
                return f"expected tables, each headed {heading}, not {found}"
            return f'expected a list, ["…"], not {found}'
        case "model_type" | "dict_type":
            reason = f"expected a table, {_heading(key)}, not {found}"
            # Several backends are a list, and [vhost.backends] is for something else.
            several = ": where connections go is backend, also if it is a list"
            return reason + (several if key.endswith("].backends") else "")
        case "literal_error":
            return f"expected {limits['expected']}, not {found}".replace("'", '"')
        case "int_type":
            return f"expected a whole number, not {found}"
        case "bool_type":
            return f"expected true or false, not {found}"
        case "greater_than_equal":
            return f"expected {limits['ge']} or more, not {found}"
        case "less_than_equal":
            return f"expected {limits['le']} or less, not {found}"
    return details["msg"]


def _heading(key: str) -> str:
    table = re.sub(r"\[\d+\]", "", key)
    arrays = ("listen", "vhost", "tunnel", "vhost.certificates", "keyd.client")
    return f"[[{table}]]" if table in arrays else f"[{table}]"
