"""A process's name in ps(1), in top(1) and in the kernel's messages.

Run by each process as it starts. The name is for people, and gives no rights.
"""

import os
from collections.abc import Iterable
from contextlib import suppress

from keyd.linux import prctl
from keyd.linux.calls import memory

__all__ = ["NAME_OCTETS", "PR_SET_NAME", "CommandLine", "set_title"]

#: The option that sets the short name, which the kernel uses, and its longest length (prctl(2)).
PR_SET_NAME, NAME_OCTETS = 15, 15


class CommandLine:
    """The memory that /proc/PID/cmdline shows: it is the process's own, which may write to it."""

    def __init__(self) -> None:
        """Find it by /proc, which a process in an empty root does not have."""
        self._start = self._octets = 0
        with suppress(OSError):
            with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
            # proc_pid_stat(5): arg_start and arg_end.
            self._start = int(fields[45])
            self._octets = int(fields[46]) - self._start

    def write(self, words: Iterable[str]) -> None:
        """Replace the command line by these words; if they do not fit, it stays as it is."""
        place, content = self.place(words)
        memory(place, len(content))[:] = content

    def place(self, words: Iterable[str]) -> tuple[int, bytes]:
        """The address, and the octets to write there: none if the words do not fit."""
        content = b"".join(os.fsencode(word) + b"\0" for word in words)
        if len(content) > self._octets:
            return self._start, b""
        return self._start, content.ljust(self._octets, b"\0")


def set_title(name: str, *words: str) -> None:
    """Set the short name, at most 15 octets, and the command line, to ``words``."""
    prctl.set_name(name)
    CommandLine().write(words)
