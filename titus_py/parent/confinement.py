"""What the parent gives up once it has started its fork server. Run by the parent, as root."""

import signal
from collections.abc import Iterable, Sequence

import prctl

from keyd.linux import seccomp
from keyd.linux.credentials import become_with, hide_memory

__all__ = ["confine"]


def confine(
    uid: int, groups: Sequence[int], capabilities: Iterable[int], program: seccomp.Program
) -> None:
    """Become this user, in these groups, with these capabilities and behind this filter, for good.

    Raises OSError; then the caller must not go on.
    """
    become_with(uid, uid, capabilities, groups)
    # A change of uid resets the flag, and clears the parent-death signal. If the supervisor has
    # died in between, its socket tells.
    hide_memory()
    prctl.set_pdeathsig(signal.SIGKILL)
    seccomp.install(program)
