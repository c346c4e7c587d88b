"""What is free between what workers inherit: taken, so that what a worker makes lies together.

Run by the fork server once it has loaded everything. A worker copies each page that it writes to.
What it allocates would go where something was freed, to a page here and a page there. With these
places taken, it comes from the end of the C library's heap, and from new pools of Python's.
"""

import ctypes
from itertools import chain
from mmap import PAGESIZE

__all__ = ["fill_holes"]

_libc = ctypes.CDLL(None)
#: <malloc.h>
_M_MXFAST = 1

#: Python's allocator (obmalloc.c): for each of these sizes it has pools, each with a header.
_SIZES = range(16, 513, 16)
_POOL_OCTETS, _HEADER_OCTETS = 16 * 1024, 48
#: A pool is new if so many objects in a row, each above the one before, are among its first. In
#: an old one, these may have been freed, but in another order.
_IN_A_ROW, _FIRST = 4, 16
#: How many objects are made at most: more are only wanted by a Python that has other pools.
_MOST_OBJECTS = 16 * 1024
#: Of bytes, without what is in them; and a number that Python makes anew each time.
_BYTES_OCTETS, _LARGE = 33, 1 << 29

#: Sizes of blocks, the largest first, each a bit smaller than the one before.
_BLOCKS = (range(64 * 1024, 1024, -512), range(1024, 15, -16))
#: How many blocks are allocated at most: more are only wanted by another C library's malloc.
_MOST_BLOCKS = 64 * 1024

_kept: list[object] = []


def fill_holes() -> None:
    """Do this last before forking: what is freed later is a hole again."""
    _fill_pools()
    if hasattr(_libc, "malloc_trim"):
        _fill_heap()


def _fill_pools() -> None:
    """Make objects of each size, until they are the first in their pool."""
    # In a list that never grows: an outgrown one would leave holes.
    kept: list[object] = [None] * _MOST_OBJECTS
    _kept.append(kept)
    at = 0
    for size in _SIZES:
        row = before = 0
        while row < _IN_A_ROW and at < _MOST_OBJECTS:
            kept[at] = one = _new(size, at)
            at += 1
            place = id(one)
            is_first = place % _POOL_OCTETS < _HEADER_OCTETS + _FIRST * size
            row = row + 1 if is_first and place > before else 0
            before = place
    del kept[at:]


def _new(size: int, number: int) -> object:
    """An object of this size."""
    if size == _SIZES[0]:
        return object()
    if size == _SIZES[1]:
        return _LARGE + number
    return bytes(size - _BYTES_OCTETS)


def _fill_heap() -> None:
    """Allocate blocks of each size, until one comes from the end of the heap."""
    malloc, free, sbrk = _libc.malloc, _libc.free, _libc.sbrk
    malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    free.argtypes, free.restype = [ctypes.c_void_p], None
    sbrk.argtypes, sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
    # What is freed joins what is free beside it from now on, however small it is.
    _libc.mallopt(_M_MXFAST, 0)
    # Then what is free at the end is little more than a page.
    _libc.malloc_trim(0)
    end = sbrk(0) - 2 * PAGESIZE
    left = _MOST_BLOCKS
    for size in chain(*_BLOCKS):
        while left and (block := malloc(size)) is not None:
            left -= 1
            if block >= end:
                free(block)
                break
