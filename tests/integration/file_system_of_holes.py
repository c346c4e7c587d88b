"""A file system that is a program (FUSE), with one file, of which it says that all is a hole.

Run as root, with a directory to mount it at. It serves until it is unmounted. What is written to
the file stays in the page cache, and is thrown away here. The next argument is the uid of the user
who has mounted it, as the kernel is to have it. More are numbers of operations: whoever asks for
these waits for good. The messages: linux/fuse.h.
"""

import ctypes
import errno
import os
import struct
import sys

OCTETS = 1 << 20
_ROOT, _FILE = 1, 2
_LOOKUP, _FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE = 1, 2, 3, 4, 14, 15, 16
_RELEASE, _FLUSH, _INIT, _LSEEK = 18, 25, 26, 46
_REQUEST, _REPLY = struct.Struct("=IIQQIIII"), struct.Struct("=IiQ")
_MOST_OCTETS = 1 << 17
_WRITEBACK_CACHE, _KEEP_CACHE = 1 << 16, 1 << 1


def _attributes(node: int) -> bytes:
    mode, octets = (0o40755, 0) if node == _ROOT else (0o100600, OCTETS)
    return struct.pack("=6Q10I", node, octets, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def _answer(operation: int, node: int, body: bytes) -> bytes | int | None:
    """What is sent back, or an error's number, or nothing."""
    if operation == _INIT:
        flags = _WRITEBACK_CACHE
        return struct.pack("=4IHHIIHHI7I", 7, 31, 0, flags, 9, 9, 1 << 16, 1, 0, 0, 0, *[0] * 7)
    if operation == _LOOKUP:
        return struct.pack("=QQQQII", _FILE, 0, 1 << 30, 1 << 30, 0, 0) + _attributes(_FILE)
    if operation in (_GETATTR, _SETATTR):
        return struct.pack("=QII", 1 << 30, 0, 0) + _attributes(node)
    if operation == _OPEN:
        return struct.pack("=QII", 1, _KEEP_CACHE, 0)
    if operation == _READ:
        _, offset, octets = struct.unpack_from("=QQI", body)
        return bytes(max(0, min(octets, OCTETS - offset)))
    if operation == _WRITE:
        return struct.pack("=II", *struct.unpack_from("=I", body, 16), 0)
    if operation == _LSEEK:
        (whence,) = struct.unpack_from("=I", body, 16)
        return errno.ENXIO if whence == os.SEEK_DATA else struct.pack("=Q", OCTETS)
    if operation in (_FLUSH, _RELEASE):
        return b""
    return None if operation == _FORGET else errno.ENOSYS


def main(directory: str, uid: str, hangs: frozenset[int]) -> None:
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id={uid},group_id=0"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"holes", directory.encode(), b"fuse", 0, options.encode()) < 0:
        raise OSError(ctypes.get_errno(), "mount")
    print(flush=True)
    while True:
        try:
            request = os.read(device, _MOST_OCTETS)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                return
            raise
        _, operation, unique, node, *_ = _REQUEST.unpack_from(request)
        if operation in hangs:
            continue
        answer = _answer(operation, node, request[_REQUEST.size :])
        if answer is not None:
            error_number, octets = (0, answer) if isinstance(answer, bytes) else (-answer, b"")
            length = _REPLY.size + len(octets)
            os.write(device, _REPLY.pack(length, error_number, unique) + octets)


if __name__ == "__main__":
    main(*sys.argv[1:3], frozenset(map(int, sys.argv[3:])))
