"""Entering namespaces other than those that a process is forked into (namespaces(7)).

Python has os.unshare and os.setns only from 3.12 on.
"""

from keyd.linux.calls import call
from keyd.linux.process import CLONE_NEWNET

__all__ = ["enter_network_namespace", "leave_namespaces"]


def leave_namespaces(flags: int) -> None:
    """Move into new, empty namespaces of these kinds (unshare(2)); raises OSError."""
    call("unshare", flags)


def enter_network_namespace(descriptor: int) -> None:
    """Move into this network namespace (setns(2)); raises OSError."""
    call("setns", descriptor, CLONE_NEWNET)
