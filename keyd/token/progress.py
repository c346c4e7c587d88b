"""A page of memory on which the process with a token's module says how it gets on.

Shared by the process that watches, which makes it, and the one with the module, which writes it. It
is believed: whoever writes it wrongly is killed too late, or too early, and that is their own end.
"""

import mmap
import struct
import time

__all__ = ["Progress"]

#: Until when (CLOCK_MONOTONIC) the module may take, zero while it does nothing; and how many
#: questions have been answered.
_FIELDS = struct.Struct("=dQ")


class Progress:
    """Is inherited through fork(2)."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)

    def begin(self) -> None:
        """A new process: nothing yet."""
        _FIELDS.pack_into(self._page, 0, 0.0, 0)

    def busy(self, seconds: float) -> None:
        """The module may take so long for what comes now."""
        _FIELDS.pack_into(self._page, 0, time.monotonic() + seconds, self.answered)

    def idle(self, answers: int = 0) -> None:
        """The module is done, and so many questions more have been answered."""
        _FIELDS.pack_into(self._page, 0, 0.0, self.answered + answers)

    @property
    def answered(self) -> int:
        answered: int = _FIELDS.unpack_from(self._page)[1]
        return answered

    @property
    def hangs(self) -> bool:
        until: float = _FIELDS.unpack_from(self._page)[0]
        return 0 < until < time.monotonic()
