"""Every event that keyd and the parent send is one that the supervisor understands.

It ends a child that says anything else (``supervisor/child_events.py``).
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from titus_py.supervisor.child_events import EVENTS, fields_of

_REPOSITORY = Path(__file__).parents[3]


def _told(path: Path) -> Iterator[tuple[str, set[str], bool]]:
    """The events of a child's source: name, fields, and whether those are all."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(
                func=ast.Attribute(attr="_tell") | ast.Name(id="tell" | "tell_news"),
                args=[ast.Constant(str(name)), *_],
                keywords=keywords,
            ):
                fields = {keyword.arg for keyword in keywords if keyword.arg is not None}
                yield name, fields - {"report"}, len(fields) == len(keywords)


@pytest.mark.parametrize(
    ("child", "sources"),
    [("keyd", ["keyd/serve.py"]), ("parent", sorted(_REPOSITORY.glob("titus_py/parent/*.py")))],
)
def test_every_event_that_a_child_sends_is_known(child: str, sources: list[Path | str]) -> None:
    found = set()
    for source in sources:
        for name, fields, all_of_them in _told(_REPOSITORY / source):
            known = fields_of(child, name)
            assert known is not None, f"{name} is not among the events of {child}"
            assert fields <= known.keys(), name
            needed = {field for field, optional in known.items() if not optional}
            assert not all_of_them or needed <= fields, name
            found.add(name)
    # Those that have no name at the call, and those of the outbox and the teller themselves.
    by_variable = {"malformed_message", "unexpected_message", "events_lost", "operations"}
    by_variable |= {"keyd_said"}
    assert EVENTS[child].keys() - by_variable <= found
