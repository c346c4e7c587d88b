"""The heap on huge pages: what it holds stays, and what fills none is left alone."""

import ctypes
import json
import mmap
import os
import re
import subprocess
import sys

import pytest

from titus_py.fork_server.huge_pages import heap, use_huge_pages
from titus_py.parent import forks

_HUGE = 2 << 20
#: In a Python of its own: where what is in front of the heap ends; the heap before and after it was
#: extended, the number of huge pages, where the C library then has a new block and Python a new
#: object, and whether all can be read.
_PROGRAM = """
import ctypes, json, sys
from titus_py.fork_server.heap import fill_holes, use_one_heap
from titus_py.fork_server.huge_pages import fill_up, heap, use_huge_pages

use_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.mmap.argtypes, libc.mmap.restype = [ctypes.c_void_p, *[ctypes.c_size_t] * 5], ctypes.c_void_p
start = heap().start  # What this allocates may extend the heap: the next time, there is room.
with open("/proc/self/maps") as maps:
    ends = [int(line.partition("-")[2].split()[0], 16) for line in maps]
front = max(end for end in ends if end <= start)
before = heap()
neighbours = {"below": before.start - 4096, "behind": before.stop, "near": before.stop + (1 << 17)}
for at in [neighbours[word] for word in sys.argv[1:]]:
    assert libc.mmap(at, 4096, 1, 0x100022, 2**64 - 1, 0) == at
after = fill_up(before).place
fill_holes()
huge = use_huge_pages(after)
new = bytes(1000)
below = [ctypes.c_char.from_address(at).value for at in range(after.start, before.start, 4096)]
print(json.dumps([front, [before.start, before.stop], [after.start, after.stop], huge,
    libc.malloc(1000), id(new), below == [bytes(1)] * len(below)]))
"""


@pytest.fixture
def region() -> tuple[mmap.mmap, int]:
    """A mapping with room for three huge pages, and the address of the first."""
    region = mmap.mmap(-1, 4 * _HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for at in range(0, len(region), mmap.PAGESIZE):
        region[at : at + 8] = at.to_bytes(8)
    return region, -(-address // _HUGE) * _HUGE


def huge(address: int) -> int:
    """How many octets of the mapping at this address are on huge pages (proc_pid_smaps(5))."""
    here = False
    with open("/proc/self/smaps", encoding="ascii", errors="replace") as smaps:
        for line in smaps:
            if place := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
                here = int(place[1], 16) <= address < int(place[2], 16)
            elif here and line.startswith("AnonHugePages:"):
                return int(line.split()[1]) * 1024
    raise AssertionError("no such mapping")


def test_what_is_on_huge_pages_holds_what_it_held(region: tuple[mmap.mmap, int]) -> None:
    content, first = region
    assert huge(first) == 0
    assert use_huge_pages(range(first, first + 3 * _HUGE)) == 3
    assert huge(first) == 3 * _HUGE
    for at in range(0, len(content), mmap.PAGESIZE):
        assert content[at : at + 8] == at.to_bytes(8)


@pytest.mark.parametrize(
    ("start", "stop"), [(mmap.PAGESIZE, 2 * _HUGE - mmap.PAGESIZE), (0, mmap.PAGESIZE), (0, 0)]
)
def test_what_fills_none_is_left_alone(
    region: tuple[mmap.mmap, int], start: int, stop: int
) -> None:
    _, first = region
    assert use_huge_pages(range(first + start, first + stop)) == 0
    assert huge(first) == 0


def test_what_is_there_no_more_is_no_mistake() -> None:
    region = mmap.mmap(-1, 4 * _HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    region.close()
    assert use_huge_pages(range(address, address + 4 * _HUGE)) == 0


def test_a_childs_writes_are_its_own(region: tuple[mmap.mmap, int]) -> None:
    content, first = region
    use_huge_pages(range(first, first + 3 * _HUGE))
    before = bytes(content)
    child = os.fork()
    if not child:
        content[_HUGE : _HUGE + 5] = b"child"
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert bytes(content) == before


def test_the_heap_is_where_the_c_library_allocates() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    assert libc.malloc(1000) in heap()


def _extended(*arguments: str) -> tuple[range, range, int, list[int]]:
    """The heap before and after, how many huge pages, and where what is new lies."""
    for _ in range(10):
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, *arguments],
            env=forks.MALLOC,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        front, before, after, count, *new, is_empty = json.loads(done.stdout)
        assert is_empty
        # The kernel begins it at random within 1 GiB behind the program: rarely right behind it.
        if before[0] - front >= _HUGE:
            return range(*before), range(*after), count, new
    raise AssertionError("there is never room in front of the heap")


def test_all_of_the_heap_is_on_huge_pages_and_what_is_new_comes_behind() -> None:
    before, after, count, new = _extended()
    assert before.start - _HUGE < after.start <= before.start < before.stop <= after.stop
    assert after.start % _HUGE == after.stop % _HUGE == 0
    assert count == len(after) // _HUGE
    assert all(after.stop <= place < after.stop + 64 * mmap.PAGESIZE for place in new)


def test_a_neighbour_of_the_heap_is_left_where_it_is() -> None:
    before, after, count, _ = _extended("below")
    assert (before.start, 0) == (after.start, after.stop % _HUGE)
    assert count == len(after) // _HUGE > 0


@pytest.mark.parametrize("where", ["behind", "near"])
def test_a_heap_that_cannot_be_extended_stays_where_it_is(where: str) -> None:
    """Elsewhere, where the C library goes on, is far: what is between is not all gone through."""
    before, after, count, _ = _extended(where)
    assert before == after
    assert count <= len(after) // _HUGE


#: In a Python of its own: where there is room; the blocks that were made while it was kept; those
#: that are made once it is open. Holes of the blocks' size are everywhere.
_ROOM = """
import ctypes, json
from titus_py.fork_server.heap import fill_holes, use_one_heap
from titus_py.fork_server.huge_pages import fill_up, heap, open_up

use_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
filled = fill_up(heap(), 1 << 20)
blocks = [libc.malloc(3000) for _ in range(600)]
for block in blocks[::2]:
    libc.free(block)
fill_holes()
room = open_up(filled)
fill_holes(room.start, room.stop)
print(json.dumps([[room.start, room.stop], blocks, [libc.malloc(3000) for _ in range(200)]]))
"""


def test_what_is_made_once_there_is_room_lies_in_it() -> None:
    """And nothing that was made before, however many holes were filled meanwhile."""
    done = subprocess.run(
        [sys.executable, "-c", _ROOM],
        env=forks.MALLOC,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    (first, last), before, after = json.loads(done.stdout)
    assert last - first >= 1 << 20
    assert last % _HUGE == 0
    assert not [block for block in before if first <= block < last]
    assert all(first <= block < last for block in after)
