"""A worker's whole memory, sent out by the worker itself: run within it by the tests."""

import ctypes
import errno
import select
from collections.abc import Iterator

__all__ = ["send_all_memory"]

_PAGE = 4096
_PIECE = 64 * _PAGE
#: How far from what was mapped before to look for what was mapped since: more than a worker
#: may map at all.
_BEYOND = 128 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.send.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.send.restype = ctypes.c_ssize_t


def _ranges(mappings: str) -> Iterator[tuple[int, int]]:
    """The mappings in /proc/PID/maps, and what lies around them: in one ascending order."""
    known = [
        tuple(int(address, 16) for address in line.split()[0].split("-"))
        for line in mappings.splitlines()
        if "[v" not in line
    ]
    begun = 0
    for start, end in known:
        yield max(begun, start - _BEYOND), start
        yield start, end
        begun = end
        following = min((other for other, _ in known if other >= end), default=end + _BEYOND)
        begun = min(following, end + _BEYOND)
        yield end, begun


def send_all_memory(mappings: str, client: int) -> int:
    """By send(2), which says EFAULT where there is nothing to be read."""
    count = 0
    poll = select.poll()
    poll.register(client, select.POLLOUT)
    for start, end in _ranges(mappings):
        address = start
        while address < end:
            sent = _libc.send(client, address, min(_PIECE, end - address), 0)
            if sent > 0:
                count += sent
                address += sent
            elif ctypes.get_errno() == errno.EAGAIN:
                poll.poll()
            else:
                # Nothing here; or there is, but not for all of the length.
                address += _PAGE - address % _PAGE
    return count
