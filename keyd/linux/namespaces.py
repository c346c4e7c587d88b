"""Namespaces beyond those that a process is forked into (namespaces(7)).

Python's own os.unshare and os.setns are of 3.12.
"""

import ctypes
import os

from keyd.linux.process import CLONE_NEWNET

__all__ = ["enter_network_namespace", "leave_namespaces"]

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
