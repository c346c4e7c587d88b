"""A certificate and its key, replaced: whenever that is interrupted, the two fit each other."""

import os
import signal
import sys
from pathlib import Path

import pytest

from titus_py.commands.replaced_pair import Place

#: What changes something on the disk, as Python's audit events call it.
STEPS = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.chmod"}


def pair(directory: Path, name: str, word: str) -> tuple[Path, Path]:
    directory.mkdir(parents=True, exist_ok=True)
    certificate, key = directory / f"{name}.crt", directory / f"{name}.key"
    certificate.write_text(f"certificate {word}\n")
    key.write_text(f"key {word}\n")
    key.chmod(0o600)
    os.chown(key, 12345, 54321)
    return certificate, key


def words(certificate: Path, key: Path) -> tuple[str, str]:
    return certificate.read_text().split()[1], key.read_text().split()[1]


def killed_before(step: int, certificate: Path, key: Path, new: tuple[Path, Path]) -> bool:
    """Replace the pair in a child that is killed before this step; False if it got through."""
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, _: object) -> None:
            nonlocal left
            if event in STEPS:
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.addaudithook(count)
        code = 1
        try:
            Place.of(certificate, key).replace(*new)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("linked", [False, True])
def test_whenever_it_is_killed_the_pair_fits(
    tmp_path: Path, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A killed process loses nothing that it had written, and hundreds of these take seconds.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    step, seen = 0, set()
    while True:
        directory = tmp_path / f"step-{step}"
        certificate, key = old = pair(directory / "archive", "www", "old")
        if linked:
            # As certbot's live/ is: links to where the files are.
            certificate, key = directory / "fullchain.pem", directory / "privkey.pem"
            for link, file in zip((certificate, key), old, strict=True):
                link.symlink_to(Path("archive") / file.name)
        new = pair(directory / "new", "www.new", "new")
        was_killed = killed_before(step, certificate, key, new)
        now, fitting = words(certificate, key)
        assert now == fitting
        assert key.stat().st_mode & 0o777 == 0o600
        assert (key.stat().st_uid, key.stat().st_gid) == (12345, 54321)
        seen.add(now)
        # The next run tidies up, without a change.
        Place.of(certificate, key).settle()
        assert words(certificate, key) == (now, now)
        assert sorted(os.listdir(directory / "archive")) == ["www.crt", "www.key"]
        assert not any(path.is_symlink() for path in old)
        Place.of(certificate, key).replace(*new)
        assert words(certificate, key) == ("new", "new")
        assert sorted(os.listdir(directory / "archive")) == ["www.crt", "www.key"]
        assert words(*new) == ("new", "new")
        if not was_killed:
            break
        step += 1
    assert step > 15
    assert seen == {"old", "new"}


def test_one_file_with_both_is_replaced_in_one_step(tmp_path: Path) -> None:
    both = tmp_path / "www.pem"
    both.write_text("old")
    both.chmod(0o600)
    os.chown(both, 12345, 54321)
    place = Place.of(both, both)
    certificate, key = pair(tmp_path, "new", "new")
    key.write_text("key new")  # the last line without its end
    place.replace(certificate, key)
    assert both.read_text() == "certificate new\n\nkey new"
    status = both.stat()
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o600, 12345, 54321)
    kept = tmp_path / "kept"
    kept.write_text("old")
    place.replace(kept, kept)
    assert both.read_text() == "old"


def test_links_that_lead_in_a_circle_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        Place.of(tmp_path / "a", tmp_path / "a")


@pytest.mark.parametrize("in_one_file", [False, True])
@pytest.mark.parametrize("put_there", ["link", "pipe"])
def test_what_is_no_file_is_not_copied(tmp_path: Path, put_there: str, in_one_file: bool) -> None:
    """It may have been put there since it was checked: root must not copy what it leads to."""
    certificate, key = pair(tmp_path, "www", "old")
    new_certificate, new_key = pair(tmp_path / "new", "new", "new")
    secret = tmp_path / "secret"
    secret.write_text("key of somebody else\n")
    new_key.unlink()
    if put_there == "link":
        new_key.symlink_to(secret)
    else:
        os.mkfifo(new_key)
    place = Place.of(key, key) if in_one_file else Place.of(certificate, key)
    with pytest.raises(OSError, match="not a regular file"):
        place.replace(new_certificate, new_key)
    place.settle()
    assert words(certificate, key) == ("old", "old")


@pytest.mark.parametrize("linked", ["certificate", "key"])
def test_the_owner_and_mode_are_not_those_of_a_file_elsewhere(tmp_path: Path, linked: str) -> None:
    certificate, key = pair(tmp_path, "www", "old")
    place, new = Place.of(certificate, key), pair(tmp_path / "new", "new", "new")
    public = tmp_path / "public"
    public.write_text("for everybody\n")
    public.chmod(0o644)
    replaced = getattr(place, linked)
    replaced.unlink()
    replaced.symlink_to(public)
    with pytest.raises(OSError, match="not a regular file"):
        place.replace(*new)
