"""The lines for what ``keyd listen`` refuses. Whoever may connect decides how much that is.

Run by keyd's threads. Within a second, the first refusals to a process have a line each. The others
are counted, and have one line together once the second is over. The same goes for processes: of one
user's, the first few are told apart, so that to start more of them makes no more lines. Nobody's
refusals are left out for another user's sake. The tally and the page count all of them.
"""

import threading
from collections import Counter

from keyd.linux.unix_socket import Peer
from keyd.protocol import Refusal, Status
from keyd.words import say

__all__ = ["RefusalLog"]

#: In a second: how many refusals to a process have a line each, and how many of a user's processes
#: are told apart.
_WHOLE, _PROCESSES = 3, 8
#: In place of a process's number: all others of its user's.
_OTHERS = -1


class _Heard:
    """Of a process, within this second: how many lines it has had, and what has none."""

    def __init__(self) -> None:
        self.whole = 0
        self.left_out: Counter[Status] = Counter()


class RefusalLog:
    """Says what is refused; ``say_rest`` is called about once a second, and at the end."""

    def __init__(self) -> None:
        #: By user and process.
        self._heard: dict[int, dict[int, _Heard]] = {}
        # A signal's handler may say the rest, in the middle of what the main thread does.
        self._lock = threading.RLock()

    def note(self, refusal: Refusal, peer: Peer) -> None:
        with self._lock:
            processes = self._heard.setdefault(peer.uid, {})
            is_told_apart = peer.pid in processes or len(processes) < _PROCESSES
            heard = processes.setdefault(peer.pid if is_told_apart else _OTHERS, _Heard())
            if heard.whole == _WHOLE:
                heard.left_out[refusal.status] += 1
                return
            heard.whole += 1
        say(f"refused, {refusal.status.name}: {refusal.detail} (process {peer.pid})")

    def say_rest(self) -> None:
        """Say how much has had no line yet."""
        with self._lock:
            heard, self._heard = self._heard, {}
        for user, processes in heard.items():
            for process, one in processes.items():
                if one.left_out:
                    counts = ", ".join(f"{count} {why.name}" for why, count in one.left_out.items())
                    whose = f"other processes of user {user}"
                    who = whose if process == _OTHERS else f"process {process}"
                    say(f"refused within a second, besides: {counts} ({who})")
