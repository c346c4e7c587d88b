"""What of a process's memory is worth reading: all that may hold a key, and nothing of it twice.

Run by what looks for keys in memory, as root. A process may map the same file thousands of times,
and pages as often: none of that is memory of its own, but to read it would take time that it does
not pay for. What is not read for that is told. It trusts the kernel.
"""

import heapq
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from keyd.inspection.mappings import Mapping, Skipped, Span
from keyd.inspection.pages_in_use import PAGE, in_use
from keyd.inspection.ranges import Ranges
from keyd.inspection.shared_memory import filled, kernels_own, mapped_file

__all__ = ["Known", "WorthReading"]

#: So much of a process's shared mappings is read where nothing tells what of it is filled.
_MOST_UNTOLD = 4 << 30
_TOO_LARGE = "too large for all of it to be read, and what is filled cannot be told"
#: Files of which less was read are read again, in each process: there may be very many.
_WORTH_KNOWING = 1 << 20

#: By what tells files from each other: as /proc/PID/maps has it, and as stat(2) has.
Known = dict[tuple[tuple[str, str], tuple[int, int]], Ranges]


class _File:
    """Of a file that is mapped: for which parts it was asked what is filled, and what was read."""

    def __init__(self, read: Ranges | None) -> None:
        self.asked, self.read = Ranges(), Ranges(read)


class WorthReading:
    """In one process; ``skipped`` gets what is too large. Without ``pagemap``, all is worth it.

    ``others`` is of files that other processes map as well: what was read there, and had nothing.
    """

    def __init__(
        self, pid: int, pagemap: int | None, skipped: list[Skipped], others: Known
    ) -> None:
        self._pid, self._pagemap, self._skipped, self._others = pid, pagemap, skipped, others
        self._files: dict[tuple[tuple[str, str], tuple[int, int]], _File] = {}
        self._untold = _MOST_UNTOLD
        self._left = _memory_octets()

    def of(self, mapping: Mapping) -> Iterator[Span]:
        """The parts of a mapping, in ascending order."""
        start, end, name = mapping.span
        # Beyond 2^63 ([vsyscall]) no memory is a process's own, and pagemap has no entries.
        if self._pagemap is None or start >= 1 << 63:
            yield mapping.span
            return
        if mapping.shared:
            try:
                for part in self._of_file(mapping, self._pagemap):
                    yield Span(*part, name)
                return
            except OSError:
                if end - start <= self._untold:
                    self._untold -= end - start
                    yield mapping.span
                    return
                self._skipped.append(mapping.skipped(_TOO_LARGE))
        for first, after in self._private(mapping, self._pagemap):
            # More than that is the same again.
            self._left -= after - first
            if self._left < 0:
                reason = "more of it is in use than the machine has memory"
                self._skipped.append(Skipped(name, first, end - first, reason))
                return
            yield Span(first, after, name)

    def _private(self, mapping: Mapping, pagemap: int) -> Iterable[tuple[int, int]]:
        """What is in use; of a file in memory, what it has as well: that is nowhere else.

        Nothing of the file is left out in other mappings for it: what was written here hides it.
        """
        start, end, _ = mapping.span
        if not mapping.shared and mapping.device == _device(kernels_own()):
            back = start - mapping.offset
            try:
                with mapped_file(self._pid, start, end) as (named, _):
                    told = list(filled(named, [(start - back, end - back)]))
                return _united(
                    ((one + back, other + back) for one, other in told), in_use(pagemap, start, end)
                )
            except OSError:
                if end - start <= self._untold:
                    self._untold -= end - start
                    return [(start, end)]
                self._skipped.append(mapping.skipped(_TOO_LARGE))
        return in_use(pagemap, start, end)

    def had_nothing(self) -> None:
        """What was worth reading was read, and nothing was found: it need not be read again.

        A database's buffers, for one, are mapped by hundreds of processes.
        """
        for (mapped, identity), file in self._files.items():
            # Elsewhere, another file may be what a file that was removed has been.
            if identity[0] == kernels_own() and file.read.total >= _WORTH_KNOWING:
                self._others[mapped, identity] = file.read

    def _of_file(self, mapping: Mapping, pagemap: int) -> Iterator[tuple[int, int]]:
        start, end, _ = mapping.span
        back = start - mapping.offset
        with mapped_file(self._pid, start, end) as (named, identity):
            # The kernel's own identity may be that of several files (Btrfs), and so may be what
            # stat(2) says (FUSE).
            key = mapping.file, identity
            file = self._files.setdefault(key, _File(self._others.get(key)))
            asked = file.asked.add(start - back, end - back)
            told = ((one + back, other + back) for one, other in filled(named, asked))
            try:
                # A file system that is a program of somebody's (FUSE) may call a hole what is in
                # use.
                for first, after in _united(told, in_use(pagemap, start, end)):
                    for one, other in file.read.add(first - back, after - back):
                        yield one + back, other + back
            except OSError:
                # What it has said before may not have been all.
                del self._files[key]
                raise


def _united(*kinds: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of several kinds, each of which come in ascending order; nothing comes twice."""
    done = 0
    for start, end in heapq.merge(*kinds):
        if end > done:
            yield max(start, done), end
            done = end


@cache
def _device(number: int) -> str:
    """As /proc/PID/maps has it."""
    return f"{os.major(number):02x}:{os.minor(number):02x}"


@cache
def _memory_octets() -> int:
    """The machine's, with swap: no process has more in use that is not the same again."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    swap = sum(int(line.split()[1]) for line in lines if line.startswith("SwapTotal:"))
    return os.sysconf("SC_PHYS_PAGES") * PAGE + swap * 1024
