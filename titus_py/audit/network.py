"""Looking around in another process's network namespace. Run by ``titus-py audit``, as root."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress

from keyd.linux.namespaces import enter_network_namespace

__all__ = ["in_network_of"]


def in_network_of(pid: int, look: Callable[[], None]) -> None:
    """Call this in the network namespace of a process; not at all if that has ended."""

    def enter_and_look() -> None:
        # A namespace is a thread's own: only this thread enters it, and it ends there.
        with suppress(FileNotFoundError, ProcessLookupError):
            descriptor = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                enter_network_namespace(descriptor)
            finally:
                os.close(descriptor)
            look()

    thread = threading.Thread(target=enter_and_look)
    thread.start()
    thread.join()
