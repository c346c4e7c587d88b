"""Network namespaces, each a machine of its own, and the cables between them."""

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["in_a_thread", "ip", "new_namespace", "within"]

_CLONE_NEWNET = 0x4000_0000
_libc = ctypes.CDLL(None, use_errno=True)


def in_a_thread(do: Callable[[], Any]) -> Any:
    """A network namespace is a thread's, and a socket stays in the one that it was made in."""
    results = []
    thread = threading.Thread(target=lambda: results.append(do()))
    thread.start()
    thread.join()
    (result,) = results
    return result


def new_namespace() -> int:
    """A descriptor: the namespace lasts until it is closed, and as long as a process is in it."""

    def new() -> int:
        if _libc.unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        return os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)

    namespace: int = in_a_thread(new)
    return namespace


def within(namespace: int, do: Callable[[], Any]) -> Any:
    """Do something there. Processes that it starts stay there."""

    def there() -> Any:
        if _libc.setns(namespace, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        return do()

    return in_a_thread(there)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
