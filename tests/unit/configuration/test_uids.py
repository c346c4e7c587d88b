"""Whose uids are given to workers: held against /etc, id maps, live processes, other instances."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titus_py.configuration.uids import (
    DEFAULT_KEYD_UID,
    DEFAULT_UIDS,
    handed_out,
    unmapped,
    users_and_groups,
)

WANTED = range(200_000, 265_536)


def write(directory: Path, **files: str) -> Path:
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


def test_users_and_groups_are_named(tmp_path: Path) -> None:
    etc = write(
        tmp_path,
        passwd="# a comment\n\nroot:x:0:0::/root:/bin/sh\n+nis\nbad:x:y:1::/:\n"
        "before:x:199999:1::/:\nsome:x:200000:1::/:\nlast:x:265535:1::/:\nafter:x:265536:1::/:\n",
        group="wheel:x:200001:root\nusers:x:100:\n",
    )
    assert [str(owner) for owner in users_and_groups(WANTED, etc)] == [
        f'200000 is what user "some" has ({etc}/passwd)',
        f'265535 is what user "last" has ({etc}/passwd)',
        f'200001 is what group "wheel" has ({etc}/group)',
    ]


def test_subordinate_ids_are_named(tmp_path: Path) -> None:
    """The second user of a Debian host has 165536 to 231071."""
    etc = write(
        tmp_path,
        subuid="one:100000:65536\ntwo:165536:65536\nthree:265536:65536\nbad\nworse:x:y\n",
        subgid="four:200000:1\n",
    )
    assert [str(owner) for owner in handed_out(WANTED, etc)] == [
        f'165536 to 231071 are what {etc}/subuid gives to the containers of "two"',
        f'200000 is what {etc}/subgid gives to the containers of "four"',
    ]


def test_an_etc_without_these_files(tmp_path: Path) -> None:
    assert not [*users_and_groups(WANTED, tmp_path), *handed_out(WANTED, tmp_path)]


def test_the_defaults_are_nobodys() -> None:
    """Neither useradd's (to 600100000), systemd-nspawn's (to 1879048191), nor SSSD's."""
    for ids in (DEFAULT_UIDS, range(DEFAULT_KEYD_UID, DEFAULT_KEYD_UID + 1)):
        assert ids[0] > 2_000_200_000
        assert ids[-1] < 1 << 31
        assert not list(handed_out(ids, Path("/nonexistent")))


@pytest.mark.parametrize("first", [60_001, 61_184, 65_519, 65_534, 65_535])
def test_systemds_own_are_named(first: int, tmp_path: Path) -> None:
    (owner,) = handed_out(range(first, first + 1), tmp_path)
    assert first in owner.ids


@pytest.mark.parametrize(
    ("uid_map", "gid_map", "missing"),
    [
        ("0 0 4294967295", "0 0 4294967295", None),
        ("0 524288 265536", "0 524288 265536", None),
        ("0 524288 65536", "0 524288 65536", "no uid 200000 (it has 0 to 65535)"),
        ("0 524288 265535", "0 524288 265536", "no uid 265535 (it has 0 to 265534)"),
        ("0 524288 265536", "0 1000 1", "no gid 200000 (it has 0 to 0)"),
        # in pieces, in any order
        ("200100 9 70000\n0 1 200100", "0 0 4294967295", None),
        ("200101 9 70000\n0 1 200100", "0 0 4294967295", "no uid 200100 (it has 0 to 200099, 20"),
        ("", "", "no uid 200000 (it has none)"),
    ],
)
def test_id_maps(tmp_path: Path, uid_map: str, gid_map: str, missing: str | None) -> None:
    (tmp_path / "self").mkdir()
    write(tmp_path / "self", uid_map=uid_map, gid_map=gid_map)
    said = unmapped(WANTED, tmp_path)
    assert (said is None) == (missing is None)
    assert said is None or (missing is not None and missing in said)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), max_size=5),
    st.integers(0, 60),
    st.integers(1, 30),
)
def test_a_range_is_mapped_exactly_if_each_of_it_is(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[int, int]], first: int, count: int
) -> None:
    directory = tmp_path_factory.mktemp("proc")
    (directory / "self").mkdir()
    text = "".join(f"{start:10} {start:10} {size:10}\n" for start, size in pieces)
    write(directory / "self", uid_map=text, gid_map=text)
    ids = {number for start, size in pieces for number in range(start, start + size)}
    wanted = range(first, first + count)
    assert (unmapped(wanted, directory) is None) == ids.issuperset(wanted)
