"""A worker's confinement, from root to next to nothing.

Run by the worker as soon as it is forked, before it has a client. Any step that
fails raises, and then the worker must not serve.
"""

import os
import signal
from typing import NamedTuple

import prctl

from keyd.linux.credentials import become, enter_empty_root, forbid_core_dumps, hide_memory
from keyd.linux.process import CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWUTS

__all__ = ["WORKER_NAMESPACES", "Descriptors", "confine", "keep_only"]

#: The namespaces that a worker is forked into: nobody else is in them.
WORKER_NAMESPACES = CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS

#: Where a worker finds what it holds. 0 to 2 are /dev/null: whatever the C library has
#: to say on standard error must not reach a client.
PARENT_FD = 3
KEYD_FD = 4


class Descriptors(NamedTuple):
    """What the parent had open when it forked, and the worker is to keep."""

    null: int
    parent: int


def keep_only(descriptors: Descriptors) -> None:
    """Move these to their places and close everything else."""
    for place in (0, 1, 2):
        os.dup2(descriptors.null, place)
    os.dup2(descriptors.parent, PARENT_FD, inheritable=False)
    os.closerange(PARENT_FD + 1, 1 << 20)


def confine(uid: int, chroot: str) -> None:
    """Give up root, the file system, and being looked into."""
    forbid_core_dumps()
    enter_empty_root(chroot)
    become(uid, uid)
    hide_memory()
    # After become(): a change of uid forgets it (prctl(2), PR_SET_PDEATHSIG).
    prctl.set_pdeathsig(signal.SIGKILL)
