"""Which version is installed, read without the library for that."""

import sys
from importlib import metadata
from pathlib import Path

import pytest

from titus_py.supervisor.version import version


def test_it_is_the_one_that_the_library_finds() -> None:
    assert version() == metadata.version("titus-py")


def test_another_one_is_seen_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "nowhere"), str(tmp_path)])
    assert version() == ""
    information = tmp_path / "titus_py-2.0.dist-info"
    information.mkdir()
    # While it is being replaced.
    assert version() == ""
    for number in ("2.0", "2.1"):
        text = (
            f"Metadata-Version: 2.1\nName: titus-py\nVersion: {number}\n\nVersion: of the readme\n"
        )
        (information / "METADATA").write_text(text)
        assert version() == number == metadata.version("titus-py")
