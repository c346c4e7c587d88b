"""Which memory of a process is looked at: all that has anything, and none of what is empty."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from keyd.inspection import audit, pages_in_use, status, watched, worth_reading
from keyd.inspection.files_with_keys import files_with_keys
from keyd.inspection.key_search import Needle, Search, search
from keyd.inspection.pages_in_use import PAGE, in_use
from keyd.inspection.reports import Running
from keyd.status_page import Report

from .instance import eventually
from .test_keyd_status import REPORT

#: Memory of many kinds, each with what is sought. Where the kernel lacks one, nothing is printed.
PROGRAM = """
import ctypes, mmap, os, sys
PAGE, HUGE, TERABYTE = mmap.PAGESIZE, 2 << 20, 1 << 40
PRIVATE, HOLE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 8 * TERABYTE
NORESERVE, HUGE_TLB = 0x4000, 0x40000
PAGEOUT, COLLAPSE, GUARD = 21, 25, 102
libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
sought = bytes.fromhex(sys.stdin.readline())
kept = []

def at(memory):
    kept.append(memory)
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))

def put(memory, offset, kind):
    memory[offset : offset + len(sought)] = sought
    print(kind, at(memory) + offset)

# As AddressSanitizer has it: a page here and there.
memory = mmap.mmap(-1, HOLE, PRIVATE | NORESERVE)
for offset in (0, 3 * PAGE - 8, TERABYTE + 77 * PAGE, 5 * TERABYTE - PAGE, HOLE - len(sought)):
    put(memory, offset, "sparse")
memory = mmap.mmap(-1, 3 * PAGE, PRIVATE)
put(memory, PAGE, "closed")
assert libc.mprotect(at(memory), 3 * PAGE, 0) == 0
memory = mmap.mmap(-1, 3 * PAGE, PRIVATE)
put(memory, 2 * PAGE, "guarded")
libc.madvise(at(memory), 2 * PAGE, GUARD)
memory = mmap.mmap(-1, 4 * HUGE, PRIVATE)
memory[:] = b"x" * len(memory)
put(memory, 2 * HUGE + 5, "huge")
libc.madvise(at(memory), len(memory), COLLAPSE)
memory = mmap.mmap(-1, 4 * PAGE, PRIVATE)
put(memory, PAGE, "swapped")
libc.madvise(at(memory), len(memory), PAGEOUT)
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(file, 8 * PAGE)
memory = mmap.mmap(file, 8 * PAGE, mmap.MAP_PRIVATE)
put(memory, 4 * PAGE, "file")
memory = mmap.mmap(-1, 4 * PAGE)
put(memory, 3 * PAGE, "shared")
# A database's, say: most of it is not filled, and most of that is beyond the file's end.
file = os.memfd_create("database")
os.ftruncate(file, TERABYTE)
memory = mmap.mmap(file, TERABYTE)
os.ftruncate(file, 64 << 30)
put(memory, 33 << 30, "shared")
put(memory, (64 << 30) - len(sought), "shared")
# Another process's doing: here, the page is not in use.
os.pwrite(file, sought, (5 << 30) + 9)
print("others", at(memory) + (5 << 30) + 9)
memory = mmap.mmap(-1, 4 * PAGE, PRIVATE)
put(memory, 0, "forked")
child = os.fork()
if not child:
    sys.stdin.read()
    os._exit(0)
try:
    memory = mmap.mmap(-1, HUGE, PRIVATE | HUGE_TLB)
    put(memory, PAGE, "hugetlb")
except OSError:
    pass
del sought
print(flush=True)
sys.stdin.read()
"""
SOUGHT = b"\1to be found wherever it is\2" * 2
#: Operations of FUSE (linux/fuse.h).
LOOKUP, GETATTR, LSEEK, OPENDIR = 1, 3, 46, 27
#: No kernel knows it: what it answers is what one without PAGEMAP_SCAN answers.
OTHER_CALL = 0xC06066FF


class Kinds(NamedTuple):
    pid: int
    #: Each place that has what is sought, and its kind.
    places: dict[int, str]


@pytest.fixture
def kinds(tmp_path: Path) -> Iterator[Kinds]:
    with subprocess.Popen(
        [sys.executable, "-I", "-c", PROGRAM, tmp_path / "file"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(SOUGHT.hex() + "\n")
        process.stdin.flush()
        lines = iter(process.stdout.readline, "\n")
        yield Kinds(process.pid, {int(at): kind for kind, at in map(str.split, lines)})
        process.stdin.close()


def mappings(pid: int) -> Iterator[tuple[int, int]]:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if start < 1 << 63:
            yield start, end


def joined(parts: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start, end in parts:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return found


def of_all(pid: int, largest: int) -> list[tuple[int, int]]:
    """What is in use of each mapping that is no larger."""
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    try:
        return [
            part
            for start, end in mappings(pid)
            if end - start <= largest
            for part in joined(in_use(pagemap, start, end))
        ]
    finally:
        os.close(pagemap)


def read_by_this_process() -> int:
    """How many octets, with read(2) and the like (proc_pid_io(5))."""
    return int(Path("/proc/thread-self/io").read_text().split()[1])


def database_octets(pid: int) -> int:
    """How much memory is behind the large shared mapping."""
    descriptors = Path(f"/proc/{pid}/fd").iterdir()
    file, *_ = (one for one in descriptors if os.readlink(one) == "/memfd:database (deleted)")
    return file.stat().st_blocks * 512


def found_at(found: Search) -> set[int]:
    return {hit.address for hit in found.hits}


def scans() -> bool:
    with open("/proc/self/pagemap", "rb") as pagemap:
        return pages_in_use._next_in_use(pagemap.fileno(), 0, 1 << 40) is not None


def test_it_is_found_in_memory_of_every_kind(kinds: Kinds) -> None:
    expected = {"sparse", "closed", "guarded", "huge", "swapped", "file", "shared", "others"}
    assert expected <= set(kinds.places.values())
    filled, before = database_octets(kinds.pid), read_by_this_process()
    found = search(kinds.pid, [Needle("it", SOUGHT)])
    assert not found.ended
    assert not found.unread
    missing = {kind for at, kind in kinds.places.items() if at not in found_at(found)}
    assert not missing
    # Of 8 TiB, the entries of each page would be 16 GiB.
    assert database_octets(kinds.pid) == filled
    if scans():
        assert read_by_this_process() - before < found.octets + (16 << 20)


#: Maps two files thousands of times, in parts, and one of them without having it in use.
MAPS_AGAIN = """
import mmap, os, sys
OCTETS, PART = 64 << 20, 16 << 20
sought = bytes.fromhex(sys.argv[1])
kept = []
for place in (9, OCTETS - len(sought)):
    file = os.memfd_create("again")
    for at in range(0, OCTETS, 1 << 20):
        os.pwrite(file, b"x" * (1 << 20), at)
    os.pwrite(file, sought, place)
    for each in range(1000):
        offset = each % 7 * PART // 2
        kept.append(mmap.mmap(file, min(PART, OCTETS - offset), offset=offset))
private = [mmap.mmap(file, PART, mmap.MAP_PRIVATE) for _ in range(int(sys.argv[2]))]
print(sum(len(one.read()) for one in private), flush=True)
sys.stdin.read()
"""


@contextmanager
def maps_again(private: int) -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-I", "-c", MAPS_AGAIN, SOUGHT.hex(), str(private)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process.pid
        process.stdin.close()


def test_of_a_file_nothing_is_read_twice() -> None:
    """Any user can map a large file as often as they like, at no cost."""
    with maps_again(0) as pid:
        found = search(pid, [Needle("it", SOUGHT)])
    assert not found.unread
    assert sum(hit.mapping.startswith("/memfd:again") for hit in found.hits) == 2
    assert found.octets < 256 << 20


def test_a_process_that_maps_more_than_there_is_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with private mappings, which may be of the same pages. What is not read is said."""
    monkeypatch.setattr(worth_reading, "_memory_octets", lambda: 256 << 20)
    with maps_again(64) as pid:
        found = search(pid, [Needle("it", SOUGHT)])
    assert found.octets < 512 << 20
    assert {part.reason for part in found.unread} == {
        "more of it is in use than the machine has memory"
    }


#: Maps a file on a ramfs that it alone sees, of which one page is there; it has not touched that.
ON_RAMFS = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None)
assert libc.unshare(0x20000) == 0  # CLONE_NEWNS
assert libc.mount(b"it", b"/", None, 0x44000, None) == 0  # MS_PRIVATE, of all
assert libc.mount(b"it", os.fsencode(sys.argv[1]), b"ramfs", 0, None) == 0
file = os.open(sys.argv[1] + "/it", os.O_RDWR | os.O_CREAT)
os.ftruncate(file, 512 << 20)
os.pwrite(file, bytes.fromhex(sys.argv[2]), 300 << 20)
there = mmap.mmap(file, 512 << 20)
os.close(file)
print(flush=True)
sys.stdin.read()
"""


def test_of_a_file_on_ramfs_no_pages_are_made(tmp_path: Path) -> None:
    """Any user can mount one, and map a file there that is larger than all memory."""
    with subprocess.Popen(
        [sys.executable, "-I", "-c", ON_RAMFS, tmp_path, SOUGHT.hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        found = search(process.pid, [Needle("it", SOUGHT)])
        process.communicate()
    assert "/it" in {hit.mapping[-3:] for hit in found.hits}
    assert found.octets < 256 << 20
    assert not found.unread


#: Searches as a process without the capability that opens what others have mapped.
WITHOUT_CAPABILITY = """
import json, sys
import prctl
from keyd.inspection.key_search import Needle, search
from keyd.linux.credentials import keep_capabilities
keep_capabilities({prctl.CAP_SYS_PTRACE, prctl.CAP_DAC_OVERRIDE})
json.dump(search(int(sys.argv[1]), [Needle("it", bytes.fromhex(sys.argv[2]))]), sys.stdout)
"""


#: Maps a file, and writes to it through the mapping alone.
WRITES_TO_ITS_MAPPING = """
import ctypes, mmap, os, sys
file = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(file, 8 * mmap.PAGESIZE)
sought = bytes.fromhex(sys.argv[2])
memory[5 * mmap.PAGESIZE : 5 * mmap.PAGESIZE + len(sought)] = sought
os.setuid(int(sys.argv[3]))
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + 5 * mmap.PAGESIZE, flush=True)
sys.stdin.read()
"""


@contextmanager
def file_system(directory: Path, *hangs: int, uid: int = 0) -> Iterator[None]:
    """One that is a program; it does not answer what it is asked by these operations of FUSE."""
    program = Path(__file__).with_name("file_system_of_holes.py")
    with subprocess.Popen(
        [sys.executable, "-I", program, directory, str(uid), *map(str, hangs)],
        stdout=subprocess.PIPE,
        text=True,
    ) as served:
        assert served.stdout is not None
        if not served.stdout.readline():
            pytest.skip("no FUSE here")
        try:
            yield
        finally:
            # Whatever still uses it, or waits for it, does so no more.
            served.kill()
            served.wait()
            subprocess.run(["umount", "--lazy", directory], check=True)


@contextmanager
def mapped_hole(directory: Path, *hangs: int, uid: int = 0) -> Iterator[Kinds]:
    """A process, and where it has what is sought: in a hole, as its file system says."""
    with (
        file_system(directory, *hangs),
        subprocess.Popen(
            [
                *(sys.executable, "-I", "-c", WRITES_TO_ITS_MAPPING, directory / "f"),
                *(SOUGHT.hex(), str(uid)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        yield Kinds(process.pid, {int(process.stdout.readline()): "a hole"})
        process.stdin.close()


def test_what_a_file_system_calls_a_hole_is_read_where_it_is_in_use(tmp_path: Path) -> None:
    with mapped_hole(tmp_path) as held:
        found = search(held.pid, [Needle("it", SOUGHT)])
    assert set(held.places) <= found_at(found)
    assert not found.unread


def test_a_file_system_that_hangs_is_named_and_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else is searched: of the process that has mapped its file, too."""
    monkeypatch.setattr(watched, "_HANGS_SECONDS", 3.0)
    sought = [Needle("it", SOUGHT)]

    def look(pid: int, avoid: frozenset[str], at: watched.At) -> Search:
        return search(pid, sought, at=at, avoid=avoid)

    with mapped_hole(tmp_path, LSEEK) as held, maps_again(0) as other:
        pids = [held.pid] * 3 + [other]
        found = [(pid, Search.of(one)) for pid, one in watched.each(pids, look, 2)]
    assert sorted(pid for pid, _ in found) == sorted(pids)
    for pid, one in found:
        assert not one.ended
        # In its argument, for one.
        assert one.hits
        whys = [(part.mapping, part.reason) for part in one.unread]
        hangs = (str(tmp_path / "f"), "its file system does not answer")
        assert whys == ([hangs] if pid == held.pid else [])


def test_where_a_call_is_is_read_while_it_is_written() -> None:
    """One that is given up need not hang: it has had its time."""
    places = {("f", "1:2"), (400 * "d", "")}

    def look(_: object, __: frozenset[str], at: watched.At) -> None:
        while True:
            for place in places:
                at(*place)

    process = watched._Process(look)
    try:
        process.begin(None, frozenset())
        seen = {process.place() for _ in range(30_000)}
    finally:
        process.end()
    assert seen & places
    assert seen <= {*places, ("", ""), watched._NOWHERE}


def test_however_many_file_systems_hang_an_audit_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any user can mount as many as they like (fusermount3(1)). All that is root's is searched."""
    monkeypatch.setattr(watched, "_HANGS_SECONDS", 3.0)
    monkeypatch.setattr(audit, "_HANGING_SECONDS", 3.0)
    monkeypatch.setattr(audit.os, "cpu_count", lambda: 1)
    nobody = 65534
    searched = audit._Searched(["key"])
    with ExitStack() as stack:
        users = []
        for each in range(3):
            (directory := tmp_path / str(each)).mkdir()
            hole = stack.enter_context(mapped_hole(directory, LSEEK, uid=nobody))
            users.append(hole.pid)
        roots = stack.enter_context(maps_again(0))
        sought = [Needle("key: it", SOUGHT)]
        found = list(audit._look_at({*users, roots}, sought, searched))
        # Which come meanwhile, as well.
        services = stack.enter_context(maps_again(0))
        assert not list(audit._look_at({services}, sought, searched))
    assert searched.holders == {"key": {roots, services}}
    assert searched.not_all == set(users)
    # The first hangs, and is to be looked at again; nobody waits for the others.
    (said,) = found
    assert said.verdict == "not available"
    assert said.seen == "not looked at: 3 seconds have gone by with what hangs"
    assert all(f"process {pid} (" in said.subject for pid in users)


def test_files_on_a_file_system_that_hangs_hold_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any user can have a process that looks like a keyd, and say that its files are there."""
    monkeypatch.setattr(watched, "_HANGS_SECONDS", 3.0)
    hanging, beside = tmp_path / "hanging", tmp_path / "beside"
    hanging.mkdir()
    beside.write_bytes(SOUGHT)
    where = str(hanging / "f")
    told: list[dict[str, Any]] = [
        {"sockets": [where]},
        {"keys": [[where, "", ""]]},
        {"sockets": [str(beside)], "keys": [[str(beside), "", ""]]},
    ]
    fields = {name: value for name, value in REPORT.items() if name != "version"}
    keyds = [
        Running(pid, "nobody", "", Report(**fields | each)) for pid, each in enumerate(told, 1)
    ]
    with file_system(hanging, LOOKUP, GETATTR, OPENDIR):
        known = audit._known(keyds, [])
        # What is mounted in a directory is not asked.
        files = list(
            files_with_keys(
                [Needle("key: it", SOUGHT)], [str(hanging), str(tmp_path)], watched.Patience()
            )
        )
    assert {pid: hung.where for pid, hung in known.hung.items()} == {1: where, 2: where}
    assert known.askers[3][0]["user"] == "root"
    assert known.read(str(beside), "key") == SOUGHT
    named, found = sorted(files, key=lambda one: one.subject != str(hanging))
    assert (named.subject, named.verdict) == (str(hanging), "not available")
    assert found.seen.startswith(f"in {beside} ")


@pytest.mark.parametrize("as_json", [True, False])
def test_sockets_on_a_file_system_that_hangs_do_not_hold_the_status_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
) -> None:
    monkeypatch.setattr(watched, "_HANGS_SECONDS", 3.0)
    hanging, beside = tmp_path / "hanging", tmp_path / "beside"
    hanging.mkdir()
    beside.touch(0o600)
    where, fields = str(hanging / "f"), {**REPORT}
    del fields["version"]
    told = [[where, str(beside)], [str(beside)]]
    keyds = [
        Running(pid, "nobody", "", Report(**fields | {"sockets": sockets}))
        for pid, sockets in enumerate(told, 1)
    ]
    monkeypatch.setattr(status, "running", lambda: keyds)
    with file_system(hanging, LOOKUP, GETATTR):
        assert status.status(argparse.Namespace(metrics=False, json=as_json)) == 0
    said = capsys.readouterr().out
    problem = f"not looked at, because of {where} (no progress in 3 seconds)"
    root = {"path": str(beside), "mode": "rw-------", "user": "root", "group": "root"}
    if as_json:
        assert [one["sockets"] for one in json.loads(said)] == [
            [{"path": path, "problem": problem} for path in told[0]],
            [root],
        ]
    else:
        for path in told[0]:
            assert f"  may ask  {path}: {problem}\n" in said
        assert f"  may ask  {beside}  rw-------  root:root\n" in said


def test_however_many_sockets_are_there_the_status_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each took its time, and any user may have any number of them: root's are looked at first."""
    monkeypatch.setattr(status, "_IN_ALL_SECONDS", 1.0)
    fields = {name: value for name, value in REPORT.items() if name != "version"}
    where = str(tmp_path / "f")
    with file_system(tmp_path, LOOKUP, GETATTR), ExitStack() as stack:
        command = ["cat"]
        forged = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, user="nobody", cwd="/")
            ).pid
            for _ in range(10)
        ]
        keyds = [
            Running(pid, "nobody", "", Report(**fields | {"sockets": [where]})) for pid in forged
        ]
        roots = Running(os.getpid(), "root", "", Report(**fields | {"sockets": ["/"]}))
        seen = status._look([*keyds, roots]).askers
    assert seen[os.getpid()][0]["user"] == "root"
    problems = [seen[pid][0]["problem"] for pid in forged]
    why = "(not done in 1 seconds, with others)"
    assert problems[0] == f"not looked at, because of {where} {why}"
    assert problems[-1] == f"not looked at, because of what is looked at before {why}"


#: A file in four huge pages, as a database's: one is filled, the others are holes.
IN_HUGE_PAGES = """
import ctypes, mmap, os, sys
HUGE = 2 << 20
file = os.memfd_create("huge", os.MFD_HUGETLB)
os.ftruncate(file, 4 * HUGE)
memory = mmap.mmap(file, 4 * HUGE)
sought = bytes.fromhex(sys.argv[1])
child = os.fork()
if not child:
    # Here, the page is in use; in the process that is searched, it is not.
    memory[3 * HUGE + 5 : 3 * HUGE + 5 + len(sought)] = sought
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + 3 * HUGE + 5, flush=True)
sys.stdin.read()
"""
_ROOM_FOR_HUGE_PAGES = Path("/proc/sys/vm/nr_overcommit_hugepages")


@pytest.fixture
def room_for_huge_pages() -> Iterator[None]:
    """For four; as many as are there already stay."""
    before = _ROOM_FOR_HUGE_PAGES.read_text()
    try:
        _ROOM_FOR_HUGE_PAGES.write_text(str(int(before) + 4))
    except OSError:
        pytest.skip("no room for huge pages")
    try:
        yield
    finally:
        _ROOM_FOR_HUGE_PAGES.write_text(before)


@pytest.mark.usefixtures("room_for_huge_pages")
def test_of_a_file_in_huge_pages_what_is_empty_is_not_filled() -> None:
    with subprocess.Popen(
        [sys.executable, "-I", "-c", IN_HUGE_PAGES, SOUGHT.hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if not (said := process.stdout.readline()):
            pytest.skip("no huge pages here")
        file, *_ = (
            one
            for one in Path(f"/proc/{process.pid}/fd").iterdir()
            if os.readlink(one) == "/memfd:huge (deleted)"
        )
        filled = file.stat().st_blocks
        found = search(process.pid, [Needle("it", SOUGHT)])
        assert int(said) in found_at(found)
        assert not found.unread
        assert filled > 0
        assert file.stat().st_blocks == filled
        process.stdin.close()


#: Has it in such a file that is open, and not mapped any more.
IN_AN_OPEN_FILE_OF_HUGE_PAGES = """
import mmap, os, sys
file = os.memfd_create("huge", os.MFD_HUGETLB)
os.ftruncate(file, 2 << 20)
with mmap.mmap(file, 2 << 20) as memory:
    sought = bytes.fromhex(sys.argv[1])
    memory[5 : 5 + len(sought)] = sought
print("there", flush=True)
sys.stdin.read()
"""


@pytest.mark.usefixtures("room_for_huge_pages")
def test_a_file_in_huge_pages_need_not_be_mapped() -> None:
    with subprocess.Popen(
        [sys.executable, "-I", "-c", IN_AN_OPEN_FILE_OF_HUGE_PAGES, SOUGHT.hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if not process.stdout.readline():
            pytest.skip("no huge pages here")
        found = search(process.pid, [Needle("it", SOUGHT)])
        process.stdin.close()
    places = {(hit.mapping, hit.address) for hit in found.hits}
    assert ("/memfd:huge (deleted), open", 5) in places
    assert not found.unread


def test_what_of_a_large_mapping_is_filled_has_to_be_known(kinds: Kinds) -> None:
    """Else what the process has in use is read, and the rest is said not to have been."""
    filled = database_octets(kinds.pid)
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT_CAPABILITY, str(kinds.pid), SOUGHT.hex()],
        stdout=subprocess.PIPE,
        check=True,
    )
    found = Search.of(json.loads(said.stdout))
    missing = {kind for at, kind in kinds.places.items() if at not in found_at(found)}
    assert missing == {"others"}
    (unread,) = found.unread
    assert (unread.mapping, unread.octets) == ("/memfd:database (deleted)", 1 << 40)
    assert database_octets(kinds.pid) == filled


def test_a_kernel_that_skips_nothing_tells_the_same(
    kinds: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipping = of_all(kinds.pid, 1 << 30)
    with monkeypatch.context() as older:
        older.setattr(pages_in_use, "_PAGEMAP_SCAN", OTHER_CALL)
        assert not scans()
        everything = of_all(kinds.pid, 1 << 30)
    assert skipping == everything
    places = [at for at, kind in kinds.places.items() if kind not in ("sparse", "shared", "others")]
    assert all(any(start <= at < end for start, end in skipping) for at in places)


def test_a_process_that_has_ended_is_not_one_with_nothing_in_use() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        pagemap = os.open(f"/proc/{process.pid}/pagemap", os.O_RDONLY)
        try:
            first, *_ = mappings(process.pid)
            eventually(lambda: list(in_use(pagemap, *first)), "the program looks at its own header")
            process.kill()
            process.wait()
            with pytest.raises(ProcessLookupError):
                list(in_use(pagemap, *first))
        finally:
            os.close(pagemap)


@pytest.mark.parametrize("empty", [0, 1 << 55], ids=["clean", "soft-dirty"])
def test_entries_are_read_as_the_kernel_documents_them(tmp_path: Path, empty: int) -> None:
    """A file in the place of pagemap: the kernel skips nothing of it, either."""
    count = 3 * pages_in_use._BLOCK_PAGES + 17
    present, swapped, guard = 1 << 63, 1 << 62, 1 << 62 | 1 << 58
    entries = {
        0: present,
        5: swapped,
        6: guard,
        7: present,
        pages_in_use._BLOCK_PAGES - 1: present,
        pages_in_use._BLOCK_PAGES: swapped | 1 << 55,
        count - 1: present,
    }
    file = tmp_path / "pagemap"
    file.write_bytes(
        b"".join(entries.get(page, empty).to_bytes(8, sys.byteorder) for page in range(count))
    )
    with file.open("rb") as pagemap:
        found = joined(in_use(pagemap.fileno(), 0, count * PAGE))
    block = pages_in_use._BLOCK_PAGES
    pages = [(0, 1), (5, 6), (7, 8), (block - 1, block + 1), (count - 1, count)]
    assert found == [(first * PAGE, end * PAGE) for first, end in pages]
