"""How many descriptors connections take, and how many connections a limit allows (getrlimit(2)).

Used by the parent as it starts, and when a configuration is checked. Of all processes the parent
needs the most: the supervisor has none for a connection, keyd one while the handshake lasts.
"""

from titus_py.parent.dialer import MAX_ATTEMPTS
from titus_py.parent.outbox import MAX_EVENTS

__all__ = ["connections_within", "descriptors_needed"]

#: A worker takes three: its pidfd, its report, and the socket to it. While its backend is being
#: connected to, each attempt takes one more. A client that waits for a worker takes one.
_EACH_WORKER = 3
_EACH_CONNECTION = _EACH_WORKER + MAX_ATTEMPTS
#: Listening sockets, the parent's own descriptors, and those that are open for a moment; reports of
#: workers that have ended, until they are sent.
_BESIDE = 64 + MAX_EVENTS


def descriptors_needed(connections: int, spares: int) -> int:
    """How many descriptors it takes for so many connections and so many spare workers."""
    return _BESIDE + _EACH_WORKER * spares + _EACH_CONNECTION * connections


def connections_within(limit: int, spares: int) -> int:
    """How many connections ``limit`` descriptors suffice for: one at the least."""
    return max(1, (limit - _BESIDE - _EACH_WORKER * spares) // _EACH_CONNECTION)
