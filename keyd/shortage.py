"""What keyd says where it has no room for another connection: at most once a second.

Run by keyd's threads. Whoever may connect decides how often that is.
"""

import errno
import os
import time

from keyd.words import say

__all__ = ["Shortage"]

_INTERVAL = 1.0
_REMEDIES = {
    errno.EMFILE: ": raise LimitNOFILE=",
    errno.ENOSPC: ": raise fs.epoll.max_user_watches (sysctl)",
}


class Shortage:
    def __init__(self) -> None:
        self._said = -_INTERVAL

    def say(self, error: int | None) -> None:
        """``error`` is an errno."""
        now = time.monotonic()
        if now - self._said >= _INTERVAL:
            self._said = now
            why = error or 0
            say(f"no room for another connection: {os.strerror(why)}{_REMEDIES.get(why, '')}")
