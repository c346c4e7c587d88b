"""One heap for all threads (malloc(3), mallopt(3)).

Run by keyd before it starts threads. glibc gives each thread a heap of its own, and makes one
smaller once it has held something long. Before the first time, it opens a file of /proc, and keyd's
filter kills keyd.
"""

import ctypes

__all__ = ["share_one_heap"]

#: <malloc.h>
_M_ARENA_MAX = -8


def share_one_heap() -> None:
    """Have threads that start from now on use this one's heap. Another C library has but one."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
