"""Workers whose client has left, and a kernel that does not say so."""

import gc
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, cast

from titus_py.between.event_loop import EventLoop
from titus_py.between.messages import Ends
from titus_py.parent.overstays import Overstays

#: Nobody is connected from there.
NOBODY = Ends("127.0.0.1", 1, "127.0.0.1", 2)


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    # What earlier tests left to it would be closed meanwhile.
    gc.collect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


def test_nobody_is_ended_without_the_kernels_word_and_it_is_said_once() -> None:
    killed: list[str] = []
    told: list[str] = []
    worker = SimpleNamespace(
        uid=7, connection=1, endpoints=NOBODY, backend_ends=None, kill=killed.append
    )
    loop = EventLoop()

    def tell(event: str, **fields: Any) -> None:
        told.append(f"{event} {fields['feature']}")

    def run(until: float) -> None:
        while time.monotonic() < until and not killed:
            loop.after(0.05, lambda: None)
            loop.run_once()

    plan = SimpleNamespace(
        limits=SimpleNamespace(half_closed_timeout=0.001), has_unix_clients=False
    )
    Overstays(loop, cast(Any, plan), cast(Any, SimpleNamespace(busy={7: worker})), cast(Any, tell))
    with no_descriptor_left():
        # At the second look at the latest, if the machine has time for it.
        while not told:
            run(time.monotonic() + 1.2)
    assert not killed
    assert told == ["not_available sock_diag (Too many open files)"]
    started = time.monotonic()
    run(started + 30)
    assert killed == ["client_gone"]
    assert time.monotonic() - started > 1.5, "after several looks"
    assert len(told) == 1
