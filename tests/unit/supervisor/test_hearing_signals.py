"""Signals are heard also where no watch of epoll(7) is left, as another program takes over."""

import subprocess
import sys

#: Signals are for a process's first thread, and the filter stays.
_UNWATCHED = """
import errno, signal
from types import SimpleNamespace
import pyseccomp
from titus_py.between.event_loop import EventLoop
from titus_py.supervisor.life import _Supervisor

heard = []
supervisor = SimpleNamespace(
    _loop=EventLoop(),
    _reload=SimpleNamespace(begin=lambda: heard.append("reload")),
    _stop=heard.append,
)
program = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
adding = pyseccomp.Arg(1, pyseccomp.EQ, 1)
program.add_rule(pyseccomp.ERRNO(errno.ENOSPC), "epoll_ctl", adding)
program.load()
_Supervisor._hear_signals(supervisor)
for number in (signal.SIGHUP, signal.SIGTERM):
    signal.raise_signal(number)
    before = len(heard)
    while len(heard) == before:
        supervisor._loop.run_once()
assert heard == ["reload", "SIGTERM"], heard
"""


def test_signals_are_heard_unwatched() -> None:
    subprocess.run([sys.executable, "-c", _UNWATCHED], check=True, timeout=60)
