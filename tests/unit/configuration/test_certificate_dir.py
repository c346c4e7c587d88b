"""Which files of a directory belong together."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from titus_py.configuration.certificate_dir import Pair, chosen, pairs


def test_the_layout_of_certbot_is_understood_as_it_is(tmp_path: Path) -> None:
    live, archive = tmp_path / "live", tmp_path / "archive"
    for name in ("www.example.org", "example.com-0001"):
        (archive / name).mkdir(parents=True)
        (live / name).mkdir(parents=True)
        for stem in ("cert", "chain", "fullchain", "privkey"):
            (archive / name / f"{stem}2.pem").touch()
            (live / name / f"{stem}.pem").symlink_to(f"../../archive/{name}/{stem}2.pem")
        (live / name / "README").touch()
    (live / "README").touch()
    assert pairs(live) == [
        Pair(name, live / name / "fullchain.pem", live / name / "privkey.pem")
        for name in ("example.com-0001", "www.example.org")
    ]


def test_a_file_may_hold_both(tmp_path: Path) -> None:
    (tmp_path / "b.example.pem").touch()
    (tmp_path / "a.example.pem").symlink_to("b.example.pem")
    assert pairs(tmp_path) == [
        Pair(f"{name}.example", path := tmp_path / f"{name}.example.pem", path) for name in "ab"
    ]


@pytest.mark.parametrize("kept", ["fullchain.pem", "privkey.pem"])
def test_half_a_pair_is_not_passed_over(tmp_path: Path, kept: str) -> None:
    (tmp_path / "half").mkdir()
    # A link that leads nowhere is there as well.
    (tmp_path / "half" / kept).symlink_to("gone.pem")
    assert [pair.name for pair in pairs(tmp_path)] == ["half"]


def test_everything_else_is_passed_over(tmp_path: Path) -> None:
    for name in ("empty", ".hidden", "..data"):
        (tmp_path / name).mkdir()
    (tmp_path / ".hidden" / "fullchain.pem").touch()
    for name in ("README", "site.crt", "site.key", ".old.pem", "site.pem.bak"):
        (tmp_path / name).touch()
    assert pairs(tmp_path) == []


def test_an_entry_that_leads_nowhere_hides_no_other(tmp_path: Path) -> None:
    for name in ("itself", "own.pem"):
        (tmp_path / name).symlink_to(name)
    (tmp_path / "good.pem").touch()
    assert [pair.name for pair in pairs(tmp_path)] == ["good", "own"]


def test_a_name_that_is_not_utf_8_is_passed_over(tmp_path: Path) -> None:
    """It could not be named in JSON."""
    (tmp_path / "\udcff.pem").touch()
    (tmp_path / "é.pem").touch()
    assert [pair.name for pair in pairs(tmp_path)] == ["é"]


def test_a_directory_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        pairs(tmp_path / "nowhere")


# --- which is shown --------------------------------------------------------------------


def test_of_two_for_one_name_the_one_that_is_valid_for_longer_is_shown() -> None:
    now = datetime.now(UTC)
    later = now + timedelta(days=1)
    old = ("old", ["www.example.org", "example.org"], now)
    new = ("new", ["WWW.example.org"], later)
    expected = {"www.example.org": "new", "example.org": "old"}
    assert chosen([old, new]) == chosen([new, old]) == expected


def test_of_two_that_end_together_the_first_is_shown() -> None:
    now = datetime.now(UTC)
    assert chosen([("a", ["x"], now), ("b", ["x"], now)]) == {"x": "a"}
