"""How loud events are, and which of them may be alarms.

Read by the supervisor, for its log and its counts. An alarm is an event that no healthy
instance logs, whatever its clients, its backends and the network do. An alarm wakes somebody:
false ones would soon be ignored.
"""

__all__ = ["ALARMS", "LEVELS", "is_as_loud"]

#: From the quietest to the loudest.
LEVELS = ("info", "warning", "error", "alarm")

#: The events that are alarms, or can be. Each is counted from the start, as zero: Prometheus
#: sees no rise in a series that begins with one.
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
        "metrics_died",
        "metrics_hangs",
        "parent_died",
        "parent_hangs",
        "program_broken",
        "resolver_died",
        "resolver_hangs",
        "tunnel_failed",
        "unexpected_message",
        "unintelligible",
        "worker_failed",
    }
)


def is_as_loud(level: str, least: str) -> bool:
    """Whether to record an event of this level; ``least`` is the quietest level recorded.

    An event of unknown level is recorded.
    """
    return level not in LEVELS or LEVELS.index(level) >= LEVELS.index(least)
