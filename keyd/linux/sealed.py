"""Small files without a name: how a process hands its child more than fits in argv.

memfd_create(2), sealed: the reader knows that what it reads will not change.
"""

import fcntl
import os

__all__ = ["read_all", "sealed_file"]


def sealed_file(name: str, content: bytes | memoryview) -> int:
    """A descriptor of a memory file with this content, close-on-exec, to be read from its start.

    ``name`` shows in /proc/PID/fd and serves no other purpose. Raises OSError.
    """
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_all(descriptor: int) -> bytes:
    """Read a sealed file whole, from its start, and close it."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb") as file:
        return file.read()
