"""What a process gives up that parses files of the administrator's.

Run by the short-lived ``keyd check``, ``titus_py.fork_server.handshake_check`` and
``titus_py.fork_server.client_authorities``, once they have read all that they need. Whoever started
them, root or not, believes their answers. What is in the files may be somebody else's choice: a
certificate's octets are its authority's.
"""

import errno
import time
from collections.abc import Iterable

import prctl

from keyd.linux import landlock, seccomp
from keyd.linux.credentials import forbid_core_dumps, give_up_capabilities, hide_memory
from keyd.linux.seccomp import Rules
from keyd.system_calls import PARSING

__all__ = ["confine_parser"]


def confine_parser(kept: Iterable[int] = (), more: Rules | None = None) -> None:
    """Give up everything but memory, the standard streams and these capabilities (by number).

    ``more`` calls are allowed. No file can be opened from now on, and so no module imported.
    Raises OSError, and RuntimeError where libseccomp is missing.
    """
    program = seccomp.Program(seccomp.build({**PARSING, **(more or {})}, errno.EPERM))
    # What formats a date reads the time zone.
    time.tzset()
    forbid_core_dumps()
    prctl.set_no_new_privs(1)
    give_up_capabilities(kept)
    hide_memory()
    if landlock.version():
        landlock.restrict_self(landlock.make_ruleset())
    seccomp.install(program)
