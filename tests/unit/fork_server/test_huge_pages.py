"""Heaps on huge pages: what they hold stays, and what fills none is left alone."""

import ctypes
import mmap
import os
import re

import pytest

from titus_py.fork_server.huge_pages import heaps, use_huge_pages

_HUGE = 2 << 20


@pytest.fixture
def heap() -> tuple[mmap.mmap, int]:
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


def test_a_heap_is_on_huge_pages_and_holds_what_it_held(heap: tuple[mmap.mmap, int]) -> None:
    region, first = heap
    assert huge(first) == 0
    assert use_huge_pages([range(first, first + 3 * _HUGE)]) == 3
    assert huge(first) == 3 * _HUGE
    for at in range(0, len(region), mmap.PAGESIZE):
        assert region[at : at + 8] == at.to_bytes(8)


def test_what_fills_none_is_left_alone(heap: tuple[mmap.mmap, int]) -> None:
    _, first = heap
    places = [
        range(first + mmap.PAGESIZE, first + 2 * _HUGE - mmap.PAGESIZE),
        range(first, first + mmap.PAGESIZE),
        range(first, first),
    ]
    assert use_huge_pages(places) == 0
    assert huge(first) == 0


def test_what_is_there_no_more_is_no_mistake() -> None:
    region = mmap.mmap(-1, 4 * _HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    region.close()
    assert use_huge_pages([range(address, address + 4 * _HUGE)]) == 0


def test_a_childs_writes_are_its_own(heap: tuple[mmap.mmap, int]) -> None:
    region, first = heap
    use_huge_pages([range(first, first + 3 * _HUGE)])
    before = bytes(region)
    child = os.fork()
    if not child:
        region[_HUGE : _HUGE + 5] = b"child"
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert bytes(region) == before


def test_the_heaps_are_where_objects_are() -> None:
    place = id(object())
    assert any(place in heap for heap in heaps())
    assert all(heap.start % mmap.PAGESIZE == 0 and len(heap) > 0 for heap in heaps())
