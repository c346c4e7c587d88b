"""Every event that can be logged is explained in docs/troubleshooting.md, and no other.

And those that can be alarms are known as such: to the counts, and to whoever reads of them.
"""

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import keyd.__main__
import titus_py.__main__
from titus_py.supervisor.events import ALARMS

_REPOSITORY = Path(__file__).parents[3]
#: What logs an event by a name that is in the source: which of its arguments that is.
_LOGGING = {"_event": 0, "_log": 0, "_tell": 0, "_line": 0, "_alarm": 1}
#: Which names a process's attribute may have, in what an event is called after.
_CHILDREN = {"name": ("keyd", "parent"), "_name": ("resolver", "metrics")}
#: What the parent says of a connection's end, the supervisor completes to one of these.
_ENDS = {"connection_ended", "handshake_failed", "tunnel_failed"}
#: For the supervisor's ears alone.
_NOT_LOGGED = {
    "alive",
    "claims",
    "claims_told",
    "client_known",
    "connection_over",
    "operations",
    "ready",
    "retired",
}


def _names(expression: ast.expr) -> Iterator[str]:
    """The strings that it can come to."""
    match expression:
        case ast.Constant(str(name)):
            yield name
        case ast.IfExp(body=one, orelse=other):
            yield from _names(one)
            yield from _names(other)
        case ast.JoinedStr(
            values=[ast.FormattedValue(value=ast.Attribute(attr=name)), ast.Constant(end)]
        ):
            yield from (child + end for child in _CHILDREN.get(name, ()))


def _logged(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Call(func=ast.Attribute(attr=function), args=arguments):
            if function in _LOGGING and len(arguments) > _LOGGING[function]:
                yield from _names(arguments[_LOGGING[function]])
        case ast.Dict(keys=[ast.Constant("event"), *_], values=[name, *_]):
            yield from _names(name)


def test_troubleshooting_has_the_events_that_there_are() -> None:
    page = (_REPOSITORY / "docs/troubleshooting.md").read_text()
    documented = re.findall(r"^### (\w+)$", page, re.MULTILINE)
    assert documented == sorted(documented)

    modules = [ast.parse(path.read_text()) for path in _REPOSITORY.glob("titus_py/**/*.py")]
    nodes = [node for module in modules for node in ast.walk(module)]
    logged = {name for node in nodes for name in _logged(node)}
    assert logged - _NOT_LOGGED <= set(documented)
    # Some have their names from tables and the like.
    strings = {name for node in nodes if isinstance(node, ast.expr) for name in _names(node)}
    assert set(documented) <= strings


def _may_be_an_alarm(node: ast.AST) -> bool:
    """Whether that is a call whose level is "alarm", or is reckoned."""
    if not isinstance(node, ast.Call):
        return False
    levels = [keyword.value for keyword in node.keywords if keyword.arg == "level"]
    named = isinstance(node.func, ast.Attribute) and node.func.attr == "_alarm"
    return named or any(
        not isinstance(level, ast.Constant) or level.value == "alarm" for level in levels
    )


def test_every_alarm_that_there_is_is_known_as_one() -> None:
    modules = [ast.parse(path.read_text()) for path in _REPOSITORY.glob("titus_py/**/*.py")]
    nodes = [node for module in modules for node in ast.walk(module) if _may_be_an_alarm(node)]
    found = {name for node in nodes for name in _logged(node)}
    assert "connection_over" in found
    assert found - {"connection_over"} | _ENDS == ALARMS


def test_troubleshooting_calls_every_alarm_one() -> None:
    page = (_REPOSITORY / "docs/troubleshooting.md").read_text()
    # Of the ends of a connection, a table says which.
    assert set(re.findall(r"^### (\w+)\nAlarm: ", page, re.MULTILINE)) | _ENDS == ALARMS


def test_monitoring_has_every_alert_that_there_is() -> None:
    rules = (_REPOSITORY / "systemd/prometheus/titus-py.rules.yml").read_text()
    there_are = re.findall(r"- alert: (\w+)\n(?:.*\n)*? +severity: (\w+)", rules)
    page = (_REPOSITORY / "docs/monitoring.md").read_text()
    assert sorted(re.findall(r"^\| (Titus\w+) \| (\w+) \|", page, re.MULTILINE)) == sorted(
        there_are
    )


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Those of the command and its subcommands, and these."""
    for action in parser._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            # keyd has some that are titus-py's alone: they have no help.
            for shown in action._choices_actions:
                yield shown.dest
                yield from _options(action.choices[shown.dest])


@pytest.mark.parametrize(
    ("parser", "page", "completions"),
    [
        (titus_py.__main__._parser(), "titus-py.8", ["titus-py.bash", "_titus-py"]),
        (keyd.__main__._parser(), "keyd.8", []),
    ],
    ids=["titus-py", "keyd"],
)
def test_manual_and_completion_have_every_option(
    parser: argparse.ArgumentParser, page: str, completions: list[str]
) -> None:
    options = set(_options(parser))
    assert "--version" in options
    manual = (_REPOSITORY / "docs/man" / page).read_text()
    written = {f"--{name}" for name in re.findall(r"Fl -([a-z-]+)", manual)}
    written |= set(re.findall(r"^\.(?:It )?Cm ([a-z-]+)", manual, re.MULTILINE))
    assert options - {"--help"} <= written
    for name in completions:
        completed = (_REPOSITORY / "completion" / name).read_text()
        assert options <= set(re.findall(r"[a-z-]+", completed))


def test_the_guides_are_written_as_they_are_read(tmp_path: Path) -> None:
    """What the package has of them: with the tables that are made from the code."""
    program = [sys.executable, _REPOSITORY / "docs/reference.py", "guides", tmp_path]
    subprocess.run(program, check=True)
    assert "| `titus_alarms_total` | counter |" in (tmp_path / "monitoring.md").read_text()
    assert "lock_memory" in (tmp_path / "configuration.md").read_text()


@pytest.mark.parametrize("page", ["architecture.md", "threat-model.md"])
def test_every_file_that_a_page_names_is_there(page: str) -> None:
    """By the end of its path: within a table, the folder is said above it."""
    named = re.findall(r"`([\w/.-]+\.(?:py|c|h))`", (_REPOSITORY / "docs" / page).read_text())
    tops = ("titus_py", "keyd", "tests")
    there = [str(file) for top in tops for file in (_REPOSITORY / top).rglob("*.*")]
    assert named
    assert [one for one in named if not any(file.endswith(f"/{one}") for file in there)] == []


def test_what_the_guides_have_a_shell_write_can_be_copied() -> None:
    """An indented word does not end a here-document, nor does an indented #! name a shell."""
    for page in _REPOSITORY.glob("docs/*.md"):
        for line in page.read_text().splitlines():
            assert not re.match(r"\s.*<<", line), f"{page.name}: {line}"
