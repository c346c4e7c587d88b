"""What keyd says of the hosts that it lends keys to, as it is counted and logged.

Run by the supervisor. keyd hears other hosts, and may be taken over: of its names, those count that
the configuration has.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from titus_py.configuration import Configuration
from titus_py.supervisor.counting import OTHER

__all__ = ["complete_refusal", "since"]

#: A refusal that is due to how much is asked, or to a client of that host.
_OF_THE_LOAD = ("exhausted", "expired", "unwitnessed")


def since(
    before: Iterable[Sequence[Any]], now: Iterable[Sequence[Any]], configuration: Configuration
) -> dict[str, dict[str, int]]:
    """What came to the counts of one keyd: ``done`` by client, ``refused`` by client and reason."""
    names = {client.name for client in configuration.keyd.client}
    names |= {client.name for vhost in configuration.vhost for client in vhost.client}
    earlier = {name: (done, refused) for name, _, done, refused in before}
    done_since: dict[str, int] = {}
    refused_since: dict[str, int] = {}
    for name, _, done, refused in now:
        # Without a name, it is something else than our own parent that has connected.
        label = name if name in names else OTHER
        if name in names or not name:
            done_before, refused_before = earlier.get(name, (0, {}))
            done_since[label] = max(0, done - done_before)
            for why, count in refused.items():
                refused_since[f"{label} {why}"] = max(0, count - refused_before.get(why, 0))
    return {"done": done_since, "refused": refused_since}


def complete_refusal(event: dict[str, Any]) -> None:
    """How loud it is: as an error, unless it may be due to a load that is too high."""
    event["level"] = "warning" if event["status"] in _OF_THE_LOAD else "error"
    if not event["client_name"]:
        del event["client_name"]
