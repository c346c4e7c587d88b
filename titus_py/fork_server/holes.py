"""What is free between what workers inherit: taken, so that what a worker makes lies together.

Run by the fork server once it has loaded everything. A worker copies each page that it writes to.
What it allocates would go where something was freed, to a page here and a page there. With these
places taken, it comes from the end of the C library's heap, which is Python's, too.
"""

import ctypes
from itertools import chain
from mmap import PAGESIZE

__all__ = ["fill_holes"]

_libc = ctypes.CDLL(None)
#: <malloc.h>
_M_MXFAST = 1

#: Sizes of blocks, the largest first, each a bit smaller than the one before.
_BLOCKS = (range(64 * 1024, 1024, -512), range(1024, 15, -16))
#: How many blocks are allocated at most: more are only wanted by another C library's malloc.
_MOST_BLOCKS = 64 * 1024
#: How many blocks of a size come from the end of the heap until there is no hole of that size.
_BEHIND = 16


def fill_holes() -> None:
    """Allocate blocks of each size, until they come from the end of the heap.

    Do this last before forking: what is freed later is a hole again.
    """
    if not hasattr(_libc, "malloc_trim"):
        return
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
    # What this function itself allocates and frees leaves holes behind the end.
    behind = (ctypes.c_void_p * _BEHIND)()
    for size in chain(*_BLOCKS):
        count = 0
        while left and count < _BEHIND and (block := malloc(size)) is not None:
            left -= 1
            if block >= end:
                behind[count] = block
                count += 1
        for at in range(count):
            free(behind[at])
