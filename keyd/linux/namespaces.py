"""Entering namespaces other than those that a process is forked into (namespaces(7)).

Python has os.unshare and os.setns only from 3.12 on.
"""

import ctypes
import os

from keyd.linux.process import CLONE_NEWNET

__all__ = ["enter_network_namespace", "leave_namespaces"]

_libc = ctypes.CDLL(None, use_errno=True)


def leave_namespaces(flags: int) -> None:
    """Move into new, empty namespaces of these kinds (unshare(2)); raises OSError."""
    if _libc.unshare(flags):
        error = ctypes.get_errno()
        raise OSError(error, f"unshare: {os.strerror(error)}")


def enter_network_namespace(descriptor: int) -> None:
    """Move into this network namespace (setns(2)); raises OSError."""
    if _libc.setns(descriptor, CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")
