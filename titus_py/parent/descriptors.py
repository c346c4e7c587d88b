"""How many descriptors connections take, and how many connections a limit allows (getrlimit(2)).

Asked by the parent as it starts, and when a configuration is checked. The parent needs most of all
processes: the supervisor has none for a connection, keyd one while its handshake lasts.
"""

from titus_py.parent.dialer import MAX_ATTEMPTS

__all__ = ["connections_within", "descriptors_needed"]

#: Of a worker: what shows its end (a pidfd), its report, and the socket to it; and of its client,
#: while it is being connected to a backend. A client that waits for a worker takes one.
_EACH_WORKER = 3
_EACH_CONNECTION = _EACH_WORKER + MAX_ATTEMPTS
#: Listening sockets, and the parent's own; and what is open for a moment.
_BESIDE = 64


def descriptors_needed(connections: int, spares: int) -> int:
    """For so many connections, and so many workers beside that have none."""
    return _BESIDE + _EACH_WORKER * spares + _EACH_CONNECTION * connections


def connections_within(limit: int, spares: int) -> int:
    """How many connections so many descriptors suffice for; one, where that is hardly any."""
    return max(1, (limit - _BESIDE - _EACH_WORKER * spares) // _EACH_CONNECTION)
