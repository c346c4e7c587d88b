"""What a process is called in ps(1) and top(1), and where the kernel speaks of it.

Run by each process as it starts. It decides nothing: what a process calls itself is for people.
"""

import ctypes
import os
from collections.abc import Iterable
from contextlib import suppress

import prctl

__all__ = ["NAME_OCTETS", "PR_SET_NAME", "CommandLine", "set_title"]

#: Of the shorter name, which the kernel uses (prctl(2), PR_SET_NAME).
PR_SET_NAME, NAME_OCTETS = 15, 15


class CommandLine:
    """The memory that /proc/PID/cmdline shows: the process's own, and so for it to write to."""

    def __init__(self) -> None:
        """Look where it is: in /proc, which a process in an empty root does not have."""
        self._start = self._octets = 0
        with suppress(OSError):
            with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
            # proc_pid_stat(5): arg_start and arg_end.
            self._start = int(fields[45])
            self._octets = int(fields[46]) - self._start

    def write(self, words: Iterable[str]) -> None:
        """Have these words in the place of what was there; where they do not fit, that stays."""
        content = b"".join(os.fsencode(word) + b"\0" for word in words)
        if len(content) <= self._octets:
            ctypes.memmove(self._start, content.ljust(self._octets, b"\0"), self._octets)


def set_title(name: str, *words: str) -> None:
    """``name`` is the short one, at most 15 octets; ``words`` are the new command line."""
    prctl.set_name(name)
    CommandLine().write(words)
