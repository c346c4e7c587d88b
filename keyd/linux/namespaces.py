"""Namespaces beyond those that a process is forked into (namespaces(7)).

Python's own os.unshare and os.setns are of 3.12.
"""

import ctypes
import os

from keyd.linux.process import CLONE_NEWNET

__all__ = ["empty_network_namespace", "enter_network_namespace", "leave_namespaces"]

_libc = ctypes.CDLL(None, use_errno=True)


def leave_namespaces(flags: int) -> None:
    """Be in new, empty namespaces of these kinds from now on (unshare(2)); raises OSError."""
    if _libc.unshare(flags):
        error = ctypes.get_errno()
        raise OSError(error, f"unshare: {os.strerror(error)}")


def enter_network_namespace(descriptor: int) -> None:
    """Be in this network namespace from now on (setns(2)); raises OSError."""
    if _libc.setns(descriptor, CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")


def empty_network_namespace() -> int:
    """A descriptor of a new network namespace: no interface but a loopback that is down.

    It lives as long as the descriptor or a process in it. For a process of one thread,
    which goes there and comes back. Raises OSError.
    """
    home = _own_network_namespace()
    try:
        leave_namespaces(CLONE_NEWNET)
        empty = _own_network_namespace()
        enter_network_namespace(home)
    finally:
        os.close(home)
    return empty


def _own_network_namespace() -> int:
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
