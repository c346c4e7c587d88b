"""What keyd has to say to people: whole lines, each of which is told.

A keyd that titus-py has started tells them as events of its own, before it hears a worker. Its
standard error is the log itself, which the whole instance shares: an attacker who controls keyd
could write lines there that pass for another process's. A keyd of its own has
``standard_error.StandardError``.
"""

import io
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType

__all__ = ["TEXT_CHARACTERS", "Words", "end_at_the_unforeseen", "leave_standard_error", "say"]

#: The supervisor takes no longer text.
TEXT_CHARACTERS = 1000


class Words(io.TextIOBase):
    """A text file that has each whole line told, without ``keyd: `` in front of it."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._begun = ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._tell(line.removeprefix("keyd: ")[:TEXT_CHARACTERS])
        return len(text)


def leave_standard_error(tell: Callable[[str], None]) -> None:
    """Have /dev/null for standard error, and ``tell`` for what Python writes to it.

    Standard input has to be /dev/null already.
    """
    sys.stderr.flush()
    os.dup2(0, 2)
    sys.stderr = Words(tell)


def say(line: str, who: str = "keyd") -> None:
    """To standard error, as keyd says everything.

    In one piece, newline and all: another thread may say something at the same time. Python
    flushes each line by itself.
    """
    sys.stderr.write(f"{who}: {line}\n")


def end_at_the_unforeseen(who: str = "keyd") -> None:
    """Have this process end where a thread fails with an exception that nobody foresaw, and say so.

    Whoever started keyd restarts it. What Python itself ignores, as within ``__del__``, is said as
    well. Each is one line: for a traceback, Python would open its source files, and the filter
    would kill the process, as one that was taken over. Python would do so as
    well where one of these functions fails, for want of memory.
    """
    sys.tracebacklimit = 0
    sys.excepthook = partial(_die, who)
    threading.excepthook = lambda failed: _die(
        who, failed.exc_type, failed.exc_value, failed.exc_traceback
    )
    sys.unraisablehook = lambda ignored: say(
        f"ignored: {_what(ignored.exc_type, ignored.exc_value, ignored.exc_traceback)}", who
    )


def _die(
    who: str,
    kind: type[BaseException],
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    try:
        say(_what(kind, error, trace), who)
        sys.stderr.flush()
    finally:
        # Also where there is no memory to say anything.
        os._exit(1)


def _what(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> str:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "nowhere"
    # What it is about may be a stranger's, and more than a line.
    said = f"{kind.__name__}: {error} at {where}"
    return "".join(one if one.isprintable() else "?" for one in said)
