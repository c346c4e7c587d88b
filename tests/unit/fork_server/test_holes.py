"""What is allocated after the holes were filled lies together. Each in a Python of its own."""

import json
import subprocess
import sys

from titus_py.parent import forks

#: Blocks with holes between them, of the C library's and of Python's; then more of the same.
_PROGRAM = """
import ctypes, json, sys
from titus_py.fork_server.heap import fill_holes

libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
blocks = [libc.malloc(208) for _ in range(2000)]
objects = [bytes(67) for _ in range(2000)]
for block in blocks[::2]:
    libc.free(block)
del objects[::2]
if sys.argv[1:]:
    fill_holes()
more, new = [0] * 50, [b""] * 50
for at in range(50):
    more[at] = libc.malloc(208)
for at in range(50):
    new[at] = bytes(67)
print(json.dumps([more, [id(one) for one in new]]))
"""


def _octets(*arguments: str) -> tuple[int, int]:
    """From the first to the last of the blocks, and of the objects."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments],
        env=forks.MALLOC,
        check=True,
        capture_output=True,
        text=True,
    )
    blocks, objects = (max(places) - min(places) for places in json.loads(done.stdout))
    return blocks, objects


#: Between two blocks may be what Python makes meanwhile: the number that is a place, and such.
_BETWEEN = 2 * 48


def test_what_is_new_lies_together() -> None:
    blocks, objects = _octets("fill")
    assert blocks <= 49 * (224 + _BETWEEN)
    assert objects <= 49 * (112 + _BETWEEN)


def test_otherwise_it_lies_in_the_holes() -> None:
    """The control."""
    blocks, objects = _octets()
    assert blocks > 49 * (224 + _BETWEEN)
    assert objects > 49 * (112 + _BETWEEN)
