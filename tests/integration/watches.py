"""As where the user of keyd has all watches that epoll(7) gives one (max_user_watches)."""

import errno
import select
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pyseccomp

__all__ = ["without_watches"]

_EPOLL_CTL_ADD = 1
_Done = TypeVar("_Done")


def without_watches(do: Callable[[], _Done], *epolls: select.epoll) -> _Done:
    """Do this in a thread for which there is no room in these."""

    def confined() -> _Done:
        program = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
        for epoll in epolls:
            of_it = pyseccomp.Arg(0, pyseccomp.EQ, epoll.fileno())
            adding = pyseccomp.Arg(1, pyseccomp.EQ, _EPOLL_CTL_ADD)
            program.add_rule(pyseccomp.ERRNO(errno.ENOSPC), "epoll_ctl", of_it, adding)
        program.load()
        return do()

    # The filter is this thread's alone, and ends with it.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(confined).result()
