"""In which files keyd audit looks for a key; and that it says in which it has not looked."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from keyd.inspection import files_with_keys as module
from keyd.inspection import watched
from keyd.inspection.files_with_keys import files_with_keys
from keyd.inspection.key_search import Needle
from keyd.inspection.watched import Patience

from .test_pages_in_use import file_system

SOUGHT = os.urandom(32)
TOO_LARGE = "{} larger than 262144 octets were not read"


@pytest.fixture(autouse=True)
def nothing_of_systemds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_CREDENTIALS", str(tmp_path / "none"))


def found(*directories: object) -> dict[str, tuple[str, str]]:
    """By what is looked at, or by the key: what was seen, and the verdict."""
    sought = [Needle("key: it", SOUGHT)]
    seen = list(files_with_keys(sought, list(map(str, directories)), Patience()))
    assert len({one.subject for one in seen}) == len(seen)
    return {one.subject: (one.seen, one.verdict) for one in seen}


@contextmanager
def mounted(kind: str, directory: Path, *options: str, source: str | Path = "it") -> Iterator[None]:
    subprocess.run(["mount", "-t", kind, *options, source, directory], check=True)
    try:
        yield
    finally:
        # A process that was given up may still be at it.
        subprocess.run(["umount", "--lazy", directory], check=True)


#: As root has it on another host's file system.
WITHOUT_RIGHTS = """
import json, sys
from keyd.inspection.files_with_keys import files_with_keys
from keyd.inspection.key_search import Needle
from keyd.inspection.watched import Patience
from keyd.linux.credentials import keep_capabilities
keep_capabilities(())
sought = [Needle("key: it", bytes.fromhex(sys.argv[2]))]
json.dump(list(files_with_keys(sought, [sys.argv[1]], Patience())), sys.stdout)
"""


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (closed := tmp_path / "closed").mkdir(mode=0o700)
    (secret := tmp_path / "secret").write_bytes(SOUGHT)
    secret.chmod(0o600)
    for one in (closed, secret):
        shutil.chown(one, "nobody")
    (tmp_path / "open").write_bytes(SOUGHT)
    command = [sys.executable, "-c", WITHOUT_RIGHTS, tmp_path, SOUGHT.hex()]
    done = subprocess.run(command, check=True, capture_output=True)
    seen = {one[1]: one[2:] for one in json.loads(done.stdout)}
    assert seen["key"][0].startswith(f"in {tmp_path / 'open'} ")
    text, verdict = seen[str(tmp_path)]
    assert verdict == "not available"
    assert text.startswith("not all could be read: ")
    assert f"{closed} (Permission denied)" in text
    assert f"{secret} (Permission denied)" in text


def test_an_error_of_a_file_system_is_said(tmp_path: Path) -> None:
    with file_system(tmp_path):
        seen = found(tmp_path)
    assert seen == {
        str(tmp_path): (
            f"not all could be read: {tmp_path} (Function not implemented)",
            "not available",
        )
    }


def test_a_directory_that_is_none_is_said(tmp_path: Path) -> None:
    """Whoever mistypes one has not had it looked at."""
    missing, file = tmp_path / "missing", tmp_path / "file"
    file.write_bytes(SOUGHT)
    assert found(missing, file) == {
        str(missing): (
            f"not all could be read: {missing} (No such file or directory)",
            "not available",
        ),
        str(file): (f"not all could be read: {file} (Not a directory)", "not available"),
    }


def test_of_the_usual_directories_not_all_need_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DIRECTORIES", (str(tmp_path / "missing"), str(tmp_path)))
    (tmp_path / "file").write_bytes(SOUGHT)
    (one,) = files_with_keys([Needle("key: it", SOUGHT)], None, Patience())
    assert one.seen.startswith(f"in {tmp_path / 'file'} ")


def test_a_directory_that_is_a_link_is_followed_to_another_file_system(tmp_path: Path) -> None:
    """As /srv may be one to a larger disk."""
    (disk := tmp_path / "disk").mkdir()
    (link := tmp_path / "srv").symlink_to(disk)
    with mounted("tmpfs", disk):
        (disk / "below").mkdir()
        (disk / "below" / "it").write_bytes(SOUGHT)
        seen = found(link)
    assert list(seen) == ["key"]
    assert seen["key"][0].startswith(f"in {disk}/below/it ")


def test_a_disk_that_is_mounted_below_is_searched(tmp_path: Path) -> None:
    """As /srv/data is a disk of its own. And a file, as a container's /etc/hosts, is one file."""
    image, disk, file = tmp_path / "image", tmp_path / "disk", tmp_path / "file"
    disk.mkdir()
    file.touch()
    with image.open("wb") as opened:
        opened.truncate(1 << 20)
    if not (program := shutil.which("mke2fs", path="/usr/sbin:/sbin")):
        pytest.skip("nothing makes a file system here (e2fsprogs)")
    subprocess.run([program, "-q", "-F", image], check=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(mounted("ext4", disk, "-o", "loop", source=image))
        except subprocess.CalledProcessError:
            pytest.skip("no loop devices here")
        (disk / "below").mkdir()
        for name in ("another", "below/it"):
            (disk / name).write_bytes(SOUGHT)
        with mounted("none", file, "-o", "bind", source=disk / "another"):
            sought = [Needle("key: it", SOUGHT)]
            seen = [one.seen for one in files_with_keys(sought, [str(tmp_path)], Patience())]
    # That is the image.
    seen.remove(TOO_LARGE.format(1))
    assert sorted(text.split()[1] for text in seen) == [
        str(one) for one in (disk / "another", disk / "below" / "it", file)
    ]


def test_what_is_mounted_below_is_searched_or_named(tmp_path: Path) -> None:
    """Memory is searched, and what may never answer is named."""
    memory, program, user, layers = (tmp_path / name for name in ("m", "p", "u", "l"))
    for directory in (memory, program, user, layers):
        directory.mkdir()
    where = f"lowerdir={memory}:{program}"
    with (
        mounted("overlay", layers, "-o", where),
        mounted("tmpfs", memory),
        file_system(program),
        file_system(user, uid=65534),
    ):
        (memory / "it").write_bytes(SOUGHT)
        (tmp_path / "beside").write_bytes(b"")
        sought = [Needle("key: it", SOUGHT)]
        seen = list(files_with_keys(sought, [str(tmp_path)], Patience()))
        # And not where they are searched themselves.
        named = list(files_with_keys(sought, [str(tmp_path), str(program)], Patience()))
    key, *others = sorted(seen, key=lambda one: one.subject != "key")
    assert key.seen.startswith(f"in {memory / 'it'} ")
    said = "not looked at, as something else is mounted there: "
    told = {one.verdict: one.seen for one in others if one.subject == str(tmp_path)}
    assert len(told) == len(others) == 2
    assert told["not available"] == f"{said}{program} (fuse). Give it with --directory"
    assert {f"{user} (fuse)", f"{layers} (overlay)"} == set(
        told["holds"].removeprefix(said).removesuffix(". Give it with --directory").split(", ")
    )
    assert not [one for one in named if f"{program} (fuse)" in one.seen]


def test_an_automount_is_named_and_not_set_off(tmp_path: Path) -> None:
    """What it would mount may be another host's, that does not answer."""
    (place := tmp_path / "srv").mkdir()
    reader, writer = os.pipe()
    libc = ctypes.CDLL(None, use_errno=True)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, process_group=0) as daemon:
        # Whoever is not of this group, and goes there, waits for it.
        options = f"fd={writer},pgrp={daemon.pid},minproto=5,maxproto=5,direct".encode()
        if libc.mount(b"it", os.fsencode(place), b"autofs", 0, options) < 0:
            pytest.skip("no automounts here")
        try:
            seen = found(tmp_path)
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)
            os.close(writer)
            asked = os.read(reader, 1)
            os.close(reader)
            daemon.communicate()
    assert not asked
    text = f"not looked at, as something else is mounted there: {place} (autofs)"
    assert seen == {str(tmp_path): (f"{text}. Give it with --directory", "not available")}


def test_a_directory_that_there_was_no_patience_for_is_named(tmp_path: Path) -> None:
    (one,) = files_with_keys([Needle("key: it", SOUGHT)], [str(tmp_path)], Patience(0))
    assert one == (
        *("file", str(tmp_path), "not looked at: 0 seconds have gone by with what hangs"),
        "not available",
    )


def test_what_is_in_memory_is_not_searched_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user can make directories in /run/user faster than they are searched."""
    each = watched.each
    monkeypatch.setattr(
        module, "each", lambda *words, **named: each(*words, **{"most_seconds": 0.1, **named})
    )
    (memory := tmp_path / "memory").mkdir()
    with mounted("tmpfs", memory):
        (memory / "it").write_bytes(bytes(256 << 10))
        for number in range(20_000):
            (memory / str(number)).hardlink_to(memory / "it")
        seen = found(tmp_path)
    assert seen == {
        str(memory): (
            f"not all could be read: {memory} (not done in 0.1 seconds)",
            "not available",
        )
    }


#: Has a lease on each of these files, and gives the first one back when it is asked to.
LEASES = """
import fcntl, os, signal, sys
files = [os.open(name, os.O_RDWR) for name in sys.argv[1:]]
for file in files:
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
given = files[:1]
def asked(*_):
    while given:
        fcntl.fcntl(given.pop(), fcntl.F_SETLEASE, fcntl.F_UNLCK)
signal.signal(signal.SIGIO, asked)
print(flush=True)
sys.stdin.read()
"""


def test_a_file_with_a_lease_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a moment: a file server gives it back, and a user need not."""
    given, kept = tmp_path / "given", tmp_path / "kept"
    for file in (given, kept):
        file.write_bytes(SOUGHT)
    command = [sys.executable, "-I", "-c", LEASES, given, kept]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        monkeypatch.setattr(module, "_LEASE_SECONDS", 3)
        seen = found(tmp_path)
        process.communicate()
    assert seen.pop("key")[0].startswith(f"in {given} ")
    text = f"not all could be read: {kept} (Resource temporarily unavailable)"
    assert seen == {str(tmp_path): (text, "not available")}


def test_files_that_are_too_large_are_counted(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with (tmp_path / name).open("wb") as file:
            file.write(SOUGHT)
            file.truncate((256 << 10) + 1)
    with (tmp_path / "three").open("wb") as file:
        file.truncate((256 << 10) - len(SOUGHT))
        file.seek(0, os.SEEK_END)
        file.write(SOUGHT)
    seen = found(tmp_path)
    assert seen.pop("key")[0].startswith(f"in {tmp_path / 'three'} ")
    assert seen == {str(tmp_path): (TOO_LARGE.format(2), "holds")}
