"""The configuration's reference, from the models that check it: it cannot say anything else.

``python docs/reference.py mdoc`` writes titus.toml(5); as a hook of MkDocs, this adds the page
configuration.md to the site, which is the same walk over the same tables, and to monitoring.md
the metrics. ``python docs/reference.py guides DIRECTORY`` writes the pages there, as they are read
in a terminal.
"""

import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from titus_py import configuration
from titus_py.configuration.tables import table_of
from titus_py.supervisor.exposition import exposition
from titus_py.supervisor.metrics import Metrics

PAGE = "configuration.md"
FIGURES = ("performance.md", "confinement-cost.md")
INTRODUCTION = (
    "The configuration is one file in TOML, /etc/titus-py/titus.toml unless another is named. "
    "It is read when titus-py starts and when it is told to reload, and it is checked in full "
    "first: every mistake is named at once, with its file, its key and the reason, and a mistaken "
    "configuration changes nothing. A key that is not described here is a mistake. Relative paths "
    "are relative to the file's directory."
)
VALUES = (
    ("Durations", 'are written "500ms", "10s", "2m" or "1h".'),
    (
        "Addresses",
        'are written "127.0.0.1:8080", "[::1]:8080", ":8443" (every address), "name:8080" or '
        '"unix:/run/app.sock".',
    ),
    (
        "Credentials",
        'of the systemd unit (LoadCredential= and its like) are written "credential:www.key" in '
        "the place of a path.",
    ),
)
EXAMPLE = """\
[[listen]]
address = "[::]:443"

[[vhost]]
sni = ["www.example.org"]
certificate = "/etc/titus-py/www.crt"
key = "/etc/titus-py/www.key"
backend = "127.0.0.1:8080"
"""


class Key(NamedTuple):
    """One key of a table."""

    name: str
    default: str  #: as it would be written in the file; "" where there is none
    required: bool
    description: str


class Table(NamedTuple):
    """A table of the file, and what it is for."""

    heading: str
    description: str
    keys: list[Key]


def tables() -> Iterator[Table]:
    fields = configuration.Configuration.model_fields
    keys = [_key(key, of, of.default) for key, of in fields.items() if table_of(of) is None]
    yield Table("Before the first table", "What is of the file as a whole.", keys)
    yield from _tables_of(configuration.Configuration, "")


def _tables_of(outer: type[BaseModel], prefix: str) -> Iterator[Table]:
    for name, field in outer.model_fields.items():
        model = table_of(field)
        if model is None:
            continue
        repeated = get_origin(field.annotation) is tuple
        heading = f"[[{prefix}{name}]]" if repeated else f"[{prefix}{name}]"
        description = " ".join(model.__doc__.split()).removeprefix(f"{heading}: ")
        defaults = model.model_construct().model_dump(warnings=False)
        keys = [_key(key, of, defaults.get(key)) for key, of in model.model_fields.items()]
        yield Table(heading, description[0].upper() + description[1:], keys)
        yield from _tables_of(model, f"{prefix}{name}.")


def _key(name: str, field: FieldInfo, default: Any) -> Key:
    if not field.description:
        raise SystemExit(f"{name} has no description")
    text = "" if default is None else json.dumps(default, default=str)
    return Key(name, text, field.is_required(), field.description)


def markdown() -> str:
    lines = ["# Configuration reference", "", INTRODUCTION, ""]
    lines += [f"- **{kind}** {text}" for kind, text in VALUES]
    lines += ["", "```toml", EXAMPLE.rstrip(), "```", ""]
    for table in tables():
        lines += [f"## {table.heading}", "", table.description, ""]
        for key in table.keys:
            default = f" = {key.default}" if key.default else ""
            required = " (required)" if key.required else ""
            lines += [f"`{key.name}{default}`{required}", f":   {key.description}", ""]
    return "\n".join(lines)


def metrics() -> str:
    text = exposition(Metrics(), {}).decode()
    lines = ["| metric | kind | what it counts |", "|---|---|---|"]
    pattern = r"# HELP (\w+) (.*)\n# TYPE \1 (\w+)\n"
    for name, description, kind in re.findall(pattern, text):
        lines.append(f"| `{name}` | {kind} | {description} |")
    return "\n".join(lines)


def mdoc() -> str:
    lines = [
        time.strftime(".Dd %B %-d, %Y", time.gmtime(int(os.environ["SOURCE_DATE_EPOCH"]))),
        ".Dt TITUS.TOML 5",
        ".Os",
        ".Sh NAME",
        ".Nm titus.toml",
        ".Nd configuration of titus-py",
        ".Sh DESCRIPTION",
        _prose(INTRODUCTION),
    ]
    for kind, text in VALUES:
        lines += [".Pp", _prose(f"{kind} {text}")]
    for table in tables():
        lines += [f".Ss {table.heading}", _prose(table.description), ".Bl -tag -width Ds"]
        for key in table.keys:
            default = _roff(f" = {key.default}").replace('"', '""') if key.default else ""
            required = " (required)" if key.required else ""
            lines += [f'.It Cm "{key.name}{default}{required}"', _prose(key.description)]
        lines += [".El"]
    lines += [
        ".Sh FILES",
        ".Pa /etc/titus-py/titus.toml",
        ".Sh EXAMPLES",
        ".Bd -literal -offset indent",
        _roff(EXAMPLE.rstrip()),
        ".Ed",
        ".Sh SEE ALSO",
        ".Xr systemd.exec 5 ,",
        ".Xr keyd 8 ,",
        ".Xr titus-py 8",
    ]
    return "\n".join(lines) + "\n"


def _prose(text: str) -> str:
    """A line for each sentence, as roff wants it, none of them long."""
    sentences = re.sub(r"(?<=[.?!]) (?=[A-Z])", "\n", text).split("\n")
    return _roff("\n".join(textwrap.fill(one, 79, break_on_hyphens=False) for one in sentences))


def _roff(text: str) -> str:
    """Text that is to be read as text: no escapes, and no requests."""
    return re.sub(r"^(?=[.'])", r"\\&", text.replace("\\", "\\e"), flags=re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """MkDocs: https://www.mkdocs.org/dev-guide/plugins/#on_files"""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=markdown()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs: the metrics, from what serves them."""
    return markdown.replace("<!-- metrics -->", metrics())


def guides(directory: Path) -> None:
    """All pages but those that are pictures and figures of one machine."""
    (directory / PAGE).write_text(markdown(), encoding="utf-8")
    for page in Path(__file__).parent.glob("*.md"):
        if page.name not in FIGURES:
            text = page.read_text(encoding="utf-8")
            (directory / page.name).write_text(on_page_markdown(text), encoding="utf-8")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["markdown"]:
            sys.stdout.write(markdown())
        case ["mdoc"]:
            sys.stdout.write(mdoc())
        case ["guides", place]:
            guides(Path(place))
        case _:
            raise SystemExit("reference.py markdown | mdoc | guides DIRECTORY")
