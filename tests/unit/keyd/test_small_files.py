"""What a user swaps while an audit looks at it, as root: it is not led elsewhere."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from keyd.inspection import small_files
from keyd.inspection.small_files import below, read


@pytest.fixture
def swap(tmp_path: Path) -> Callable[..., None]:
    """Puts a link to what is root's in the place of the user's directory."""
    for owner in ("user", "root"):
        (inner := tmp_path / owner / "inner").mkdir(parents=True)
        (inner / f"of_{owner}").write_text(owner)
        (inner / "both").write_text(owner)

    def swap(*_: object) -> None:
        if not (tmp_path / "user").is_symlink():
            (tmp_path / "user").rename(tmp_path / "before")
            (tmp_path / "user").symlink_to("root")

    return swap


def looked_at(
    start: Path, at: Callable[[str], None] = lambda _: None
) -> tuple[set[str], list[tuple[str, str]]]:
    problems: list[tuple[str, str]] = []
    files = below(str(start), at, lambda *problem: problems.append(problem), lambda _: None)
    return {os.path.relpath(file, start) for file in files}, problems


def test_a_directory_above(tmp_path: Path, swap: Callable[..., None]) -> None:
    start, inner = tmp_path / "user", tmp_path / "user" / "inner"
    seen = looked_at(start, lambda place: swap() if place == str(inner) else None)
    assert seen == (set(), [(str(inner), "Too many levels of symbolic links")])


def test_a_directory_that_is_open(
    tmp_path: Path, swap: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = small_files._device

    def swapped(*words: object) -> str:
        if os.readlink(f"/proc/self/fd/{words[0]}") == str(tmp_path / "user" / "inner"):
            swap()
        return device(*words)

    monkeypatch.setattr(small_files, "_device", swapped)
    found, problems = looked_at(tmp_path / "user")
    assert (found, problems) == ({"inner/of_user", "inner/both"}, [])


def test_the_directory_of_a_file(tmp_path: Path, swap: Callable[..., None]) -> None:
    file = str(tmp_path / "user" / "inner" / "both")
    before = read(file)
    assert before is not None
    assert before[1] == b"user"
    swap()
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        read(file)


def test_a_link_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "it").write_text("it")
    (tmp_path / "link").symlink_to("it")
    assert read(str(tmp_path / "link")) is None
    assert read(str(tmp_path / "missing")) is None
    assert looked_at(tmp_path) == ({"it", "link"}, [])
