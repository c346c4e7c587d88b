"""A worker that fails, and has no memory left to say why: it ends all the same, and at once."""

import os
from types import SimpleNamespace
from typing import Any

from titus_py.worker.life import live


def no_memory(**_: object) -> None:
    raise MemoryError


def test_it_exits_whatever_happens() -> None:
    terms: Any = SimpleNamespace(report=SimpleNamespace(set=no_memory))
    if (child := os.fork()) == 0:
        try:
            live(terms, "a reason")
        finally:
            # What would have the interpreter shut down.
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 70
