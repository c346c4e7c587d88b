"""Code on huge pages: it stays what it was, and is still nobody's to change.

In a process of its own for each test: what is replaced is what runs.
"""

import subprocess
import sys

BEFORE = """
import ctypes, mmap, os, re, resource
from pathlib import Path
from OpenSSL import SSL
from titus_py.fork_server.huge_code import use_huge_pages_for_code

def code(kind="r-xp"):
    "The mappings of code: where, of what file, and how much of it is on huge pages."
    found = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if place := re.match("([0-9a-f]+)-([0-9a-f]+) (....)", line):
            here = range(*(int(address, 16) for address in place.groups()[:2]))
            file = line.split()[-2 if line.endswith("(deleted)") else -1]
            found[here] = [file, 0, place[3]]
        elif line.startswith("ShmemPmdMapped:"):
            found[here][1] = int(line.split()[1]) * 1024
    return {here: one[:2] for here, one in found.items() if one[2] == kind}

def octets(place):
    return (ctypes.c_char * len(place)).from_address(place.start).raw
"""


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_code_is_what_it_was_and_runs() -> None:
    run("""
before = {place: octets(place) for place in code()}
files = {file for file, _ in code().values()}
constants = {place: octets(place) for place, one in code("r--p").items() if one[0] in files}
count = use_huge_pages_for_code()
assert count > 0
both = code() | code("r--p")
ours = [place for place, one in both.items() if one[0] == "/memfd:code"]
assert sum(map(len, ours)) == count << 21
for place, was in (before | constants).items():
    assert octets(place) == was
for place in ours:
    assert octets(place)
    assert (code() | code("r--p"))[place][1] == len(place)
for place in code():
    # Where there was none, there is none, but for constants on a huge page with code.
    assert any(one.start < place.stop and place.start < one.stop for one in before)
SSL.Connection(SSL.Context(SSL.TLS_METHOD)).get_cipher_list()
""")


def test_a_child_has_it_on_huge_pages_too() -> None:
    run("""
use_huge_pages_for_code()
child = os.fork()
if not child:
    octets(next(place for place, one in code().items() if one[0] == "/memfd:code"))
    os._exit(0 if any(on_huge_pages for _, on_huge_pages in code().values()) else 1)
assert os.waitpid(child, 0)[1] == 0
""")


def test_nobody_can_change_it() -> None:
    """Not even root, by the file; and what is made one's own to write to runs no more."""
    run("""
use_huge_pages_for_code()
place = next(place for place, one in code().items() if one[0] == "/memfd:code")
way = f"/proc/self/map_files/{place.start:x}-{place.stop:x}"
for flags in (os.O_RDWR, os.O_RDWR | os.O_TRUNC):
    try:
        file = os.open(way, flags)
        os.write(file, bytes(1))
    except PermissionError:
        pass
    else:
        raise AssertionError("written to")
try:
    mmap.mmap(os.open(way, os.O_RDWR), 4096, mmap.MAP_SHARED, mmap.PROT_WRITE)
except PermissionError:
    pass
else:
    raise AssertionError("mapped to be written to")
""")


def test_where_it_is_not_possible_all_stays_as_it_is() -> None:
    """Here, as files may not be that long."""
    run("""
before, open_before = code(), os.listdir("/proc/self/fd")
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
assert use_huge_pages_for_code() == 0
assert list(code()) == list(before)
assert os.listdir("/proc/self/fd") == open_before
""")


def test_what_may_not_be_read_stays_as_it_is() -> None:
    """The gap between code and data in many libraries: it is mapped, to be in nobody's way."""
    run("""
import tempfile
map_memory = ctypes.CDLL(None).mmap
map_memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
map_memory.restype = ctypes.c_void_p
private, fixed, anonymous, page, huge = 2, 0x10, 0x20, 4096, 2 << 20
with tempfile.NamedTemporaryFile() as library:
    library.truncate(2 * huge)
    place = map_memory(None, 3 * huge, 0, private | anonymous, -1, 0)
    place += -place % huge
    for start, octets, protection in ((0, huge - page, 5), (huge - page, 2 * page, 0)):
        way = protection, private | fixed, library.fileno()
        assert map_memory(place + start, octets, *way, start) == place + start
    use_huge_pages_for_code()
    assert code()[range(place, place + huge - page)] == [library.name, 0]
""")
