"""A regular file whose openers wait, until they are let go (fanotify(7), permission events)."""

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["HeldFile", "held"]

_FAN_CLOEXEC, _FAN_NONBLOCK, _FAN_CLASS_CONTENT = 0x1, 0x2, 0x4
_FAN_MARK_ADD, _FAN_OPEN_PERM = 0x1, 0x10000
_AT_FDCWD = -100
_FAN_ALLOW = 1
_EVENT = struct.Struct("=IBBHQii")
_RESPONSE = struct.Struct("=iI")


class HeldFile:
    """What holds the file's openers."""

    def __init__(self, group: int) -> None:
        self._group = group
        self._events: list[int] = []

    def opener(self) -> int | None:
        """The process that opens the file now, if there is one."""
        try:
            *_, event, pid = _EVENT.unpack(os.read(self._group, _EVENT.size))
        except BlockingIOError:
            return None
        self._events.append(event)
        return int(pid)

    def let_go(self) -> None:
        """Let those whom ``opener`` has named go on."""
        for event in self._events:
            os.write(self._group, _RESPONSE.pack(event, _FAN_ALLOW))
            os.close(event)
        self._events.clear()


@contextmanager
def held(path: Path) -> Iterator[HeldFile]:
    """Hold everybody who opens this file. At the end, all of them go on."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _FAN_CLASS_CONTENT | _FAN_CLOEXEC | _FAN_NONBLOCK
    group = libc.fanotify_init(flags, os.O_RDONLY | os.O_CLOEXEC)
    if group < 0:
        raise OSError(ctypes.get_errno(), "fanotify_init")
    try:
        mask = ctypes.c_uint64(_FAN_OPEN_PERM)
        if libc.fanotify_mark(group, _FAN_MARK_ADD, mask, _AT_FDCWD, os.fsencode(path)) < 0:
            raise OSError(ctypes.get_errno(), "fanotify_mark")
        holder = HeldFile(group)
        try:
            yield holder
        finally:
            holder.let_go()
    finally:
        os.close(group)
