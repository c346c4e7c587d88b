"""How loud events are, and which of them may be alarms.

Read by the supervisor, for its log and its counts. An alarm is what no healthy instance
does, whatever its clients, its backends and the network do. Somebody is woken by an alarm, and
would stop coming if it meant anything less.
"""

__all__ = ["ALARMS", "LEVELS", "is_as_loud"]

#: From the quietest to the loudest.
LEVELS = ("info", "warning", "error", "alarm")

#: The events that are alarms, or can be. Each is counted from the start, as zero: to
#: Prometheus, a series that begins with one has never risen.
ALARMS = frozenset(
    {
        "connection_ended",
        "fork_server_died",
        "giving_up",
        "handshake_failed",
        "keyd_died",
        "keyd_hangs",
        "keyd_refused",
        "malformed_message",
        "parent_died",
        "parent_hangs",
        "unexpected_message",
        "unintelligible",
        "worker_failed",
    }
)


def is_as_loud(level: str, least: str) -> bool:
    """Whether an event of this level is to be recorded where ``least`` is the quietest that is.

    One whose level is unknown is.
    """
    return level not in LEVELS or LEVELS.index(level) >= LEVELS.index(least)
