"""Which parts of a shared mapping have anything, as its file says (/proc/PID/map_files; proc(5)).

Run by what looks for keys in memory, as root. What is in a shared mapping need not be among the
pages that one process has in use. To read all of it would make memory of each page that is not
there yet: of a database's that has room for a terabyte, a terabyte. Of files, the kernel says where
they have data, also if it is swapped out (SEEK_DATA, lseek(2)). It trusts the kernel.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack

from keyd.inspection.pages_in_use import PAGE

__all__ = ["filled"]


def filled(pid: int, start: int, end: int, offset: int) -> Iterator[tuple[int, int]]:
    """The parts with data of what is mapped here, of its file from ``offset`` on.

    Raises OSError where that cannot be told: without CAP_CHECKPOINT_RESTORE, or of a device.
    """
    with ExitStack() as stack:
        # A device must not be opened: that may do something.
        named = os.open(f"/proc/{pid}/map_files/{start:x}-{end:x}", os.O_PATH | os.O_CLOEXEC)
        stack.callback(os.close, named)
        if not stat.S_ISREG(os.fstat(named).st_mode):
            raise OSError(errno.ESPIPE, "not a file")
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(f"/proc/self/fd/{named}", flags)
        stack.callback(os.close, file)
        at = start
        while at < end:
            try:
                data = os.lseek(file, offset + at - start, os.SEEK_DATA)
                hole = os.lseek(file, data, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    # There is none up to the file's end.
                    return
                raise
            first = start + (data - offset) // PAGE * PAGE
            if first >= end:
                return
            after = min(end, start - (offset - hole) // PAGE * PAGE)
            # A file system that is a program of somebody's (FUSE) may say anything.
            if not at <= first < after:
                raise OSError(errno.EIO, "no such part")
            at = after
            yield first, at
