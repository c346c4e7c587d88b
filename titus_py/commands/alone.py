"""One command at a time makes keys: their files pass through names that two would share.

Run by ``titus-py rekey`` and ``titus-py keys new``, as root.
"""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["alone"]

_LOCK = Path("/run/titus-py/rekey.lock")


@contextmanager
def alone(say: Callable[[str], None]) -> Iterator[None]:
    """Nobody else makes keys meanwhile: waits for one who does, and says so. Raises OSError."""
    _LOCK.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with open(_LOCK, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another command that makes keys to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
