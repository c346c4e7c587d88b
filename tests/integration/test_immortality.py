"""Immortal objects: as installed, and under sanitizers; and without them where Python has none."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from .sanitized import said_by, sanitized

_PROGRAM = Path(__file__).with_name("immortals.py")
_SOURCE = "titus_py/fork_server/immortal.c"
#: The objects that are looked at fill some 400 pages.
_ALL_PAGES, _HARDLY_ANY = 350, 60


@pytest.fixture(scope="module", params=["as installed", "sanitized"])
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the program said of all that it tried."""
    built = []
    if request.param == "sanitized":
        built = [sanitized(tmp_path_factory.mktemp("sanitized") / "immortal.so", _SOURCE)]
    return json.loads(said_by(_PROGRAM, *built, preload=bool(built), code=7))


def test_they_are_there_exactly_where_python_has_them(said: Any) -> None:
    assert said["available"] == ((3, 12) <= sys.version_info < (3, 14))


def test_whoever_looks_at_them_does_not_write_to_them(said: Any) -> None:
    assert said["counted_before"]
    assert said["uncounted"] == said["available"]
    before, after = said["pages"]
    assert before > _ALL_PAGES
    assert after < _HARDLY_ANY if said["available"] else after > _ALL_PAGES


def test_none_is_freed_and_all_others_are(said: Any) -> None:
    assert said["nothing_is_freed"]
    assert said["new_ones_go"]


def test_extensions_that_know_nothing_of_them_do_no_harm(said: Any) -> None:
    assert said["changed_by_old_extensions"]


def test_making_them_again_does_nothing(said: Any) -> None:
    assert said["made_again"] == (0 if said["available"] else said["made_again"])
    assert said["refused"] == "not a list"
