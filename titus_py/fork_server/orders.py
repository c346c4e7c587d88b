"""The parent's orders, and the uids in them, of which a worker is to find none but its own.

Run by the fork server, which trusts the parent, but not with a uid that is not for workers: it has
what root's uid gives, and the parent has not. A uid stays octets in one buffer, and Python makes
no number of it: what an object had in it may be left in memory, which each worker inherits. A
worker wipes the buffer before it has a client.
"""

import sys
from collections.abc import Iterable
from socket import MSG_DONTWAIT, SocketType

from keyd.linux.descriptors import receive_descriptors_into
from titus_py.between.messages import FORK_OCTETS, Fork
from titus_py.fork_server.confinement import MAX_ORDERS, OWN_UID, Given

__all__ = ["Orders"]

_UID_OCTETS = 8
_OWN_UID = OWN_UID.to_bytes(_UID_OCTETS, sys.byteorder)
_MOST_SIGNIFICANT_FIRST = -1 if sys.byteorder == "little" else 1


class Orders:
    """Those that have come together. ``calls`` are a worker's, encoded, with ``OWN_UID``.

    ``uids`` are those that workers may have.
    """

    def __init__(self, calls: bytes, uids: range) -> None:
        self._first, self._last = (uid.to_bytes(_UID_OCTETS, "big") for uid in (uids[0], uids[-1]))
        self._octets = bytearray(MAX_ORDERS * FORK_OCTETS)
        whole = memoryview(self._octets)
        self._messages = [
            whole[start : start + FORK_OCTETS] for start in range(0, len(whole), FORK_OCTETS)
        ]
        #: The calls of the worker that is forked next, and where its uid is in them. Views of
        #: memory: a bytearray would make a copy of what is assigned to a slice of it.
        self._calls = bytearray(calls)
        words = memoryview(self._calls)
        self._places = [
            words[start : start + _UID_OCTETS]
            for start in range(0, len(calls), _UID_OCTETS)
            if calls[start : start + _UID_OCTETS] == _OWN_UID
        ]

    def take(self, parent: SocketType) -> list[Given]:
        """Wait for an order, and take all that have come; none if the parent has hung up.

        Ends this process at an order for a uid that is not for workers: our parent sends none.
        """
        taken: list[Given] = []
        flags = 0
        for message in self._messages:
            try:
                octets, descriptors = receive_descriptors_into(parent, message, 2, flags)
            except BlockingIOError:
                break
            if not octets:
                return []
            uid = Fork.uid_in(message)[::_MOST_SIGNIFICANT_FIRST]
            if not (_at_least(uid, self._first) and _at_least(self._last, uid)):
                sys.exit("titus-py: the parent ordered a worker with a uid that is not for workers")
            taken.append(Given(*descriptors))
            flags = MSG_DONTWAIT
        return taken

    def uid(self, number: int) -> memoryview:
        """Of one of those that were taken, as it came."""
        return Fork.uid_in(self._messages[number])

    def with_uid(self, calls: bytes, number: int) -> bytearray:
        """The calls of its worker, complete. The next one's take their place."""
        self._calls[:] = calls
        uid = self.uid(number)
        for place in self._places:
            place[:] = uid
        return self._calls

    def forget(self) -> None:
        """In the worker: wipe all but its own."""
        self._octets[:] = bytes(len(self._octets))


def _at_least(one: Iterable[int], other: Iterable[int]) -> bool:
    """Compare octet by octet: Python has those, as numbers, before there is any uid."""
    for ours, theirs in zip(one, other, strict=True):
        if ours != theirs:
            return ours > theirs
    return True
