"""What the fork server gives back before it forks."""

import subprocess
import sys

#: 16 MiB, in pieces that are of the C library's heap. The last of them stays, and holds all others
#: in their places.
_PROGRAM = """
from titus_py.fork_server.heap import give_back

def kibibytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

pieces = [bytearray(8192) for _ in range(2048)]
last = pieces[-1]
del pieces
freed = kibibytes()
give_back()
print(freed - kibibytes(), sum(last))
"""


def test_free_memory_of_the_heap_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], check=True, capture_output=True, text=True
    )
    given_back, last = map(int, done.stdout.split())
    assert given_back > 12 * 1024
    assert last == 0
