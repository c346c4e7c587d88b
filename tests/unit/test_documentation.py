"""Every event that can be logged is explained in docs/troubleshooting.md, and no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

_REPOSITORY = Path(__file__).parents[2]
#: What logs an event by a name that is in the source: which of its arguments that is.
_LOGGING = {"_event": 0, "_log": 0, "_tell": 0, "_line": 0, "_alarm": 1}
_CHILDREN = ("keyd", "parent")
#: For the supervisor's ears alone.
_NOT_LOGGED = {"alive", "operations", "ready"}


def _names(argument: ast.expr) -> Iterator[str]:
    match argument:
        case ast.Constant(str(name)):
            yield name
        case ast.IfExp(body=one, orelse=other):
            yield from _names(one)
            yield from _names(other)
        case ast.JoinedStr(values=[ast.FormattedValue(), ast.Constant(end)]):
            yield from (child + end for child in _CHILDREN)


def _logged() -> Iterator[str]:
    for path in _REPOSITORY.glob("titus_py/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(attr=function), args=arguments):
                    if function in _LOGGING and len(arguments) > _LOGGING[function]:
                        yield from _names(arguments[_LOGGING[function]])
                case ast.Dict(keys=[ast.Constant("event"), *_], values=[name, *_]):
                    yield from _names(name)


def test_troubleshooting_has_every_event() -> None:
    documented = re.findall(
        r"^### (\w+)$", (_REPOSITORY / "docs/troubleshooting.md").read_text(), re.MULTILINE
    )
    assert documented == sorted(documented)
    assert set(documented) == set(_logged()) - _NOT_LOGGED
