"""Processes that are traced (ptrace(2)), by somebody who does not ask how they are."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["stop_as_traced", "traced"]

#: PTRACE_SEIZE (ptrace(2)): it does not stop the process. Its end is for the tracer to know first.
_TRACER = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
traced = libc.ptrace(0x4206, int(sys.argv[1]), None, None)
print(traced, flush=True)
sys.stdin.read()
"""
_PTRACE_TRACEME = 0


@contextmanager
def traced(pid: int) -> Iterator[int]:
    """By somebody else than its parent; yields who."""
    with subprocess.Popen(
        [sys.executable, "-c", _TRACER, str(pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as tracer:
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == "0\n"
        yield tracer.pid


def stop_as_traced() -> None:
    """Have this process's parent trace it, and stop."""
    ctypes.CDLL(None).ptrace(_PTRACE_TRACEME, 0, None, None)
    os.kill(os.getpid(), signal.SIGSTOP)
