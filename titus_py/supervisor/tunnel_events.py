"""What happens to tunnels: all of it counted, and of a tunnel that fails one line a second.

Run by the supervisor. A program whose tunnel fails may try again hundreds of times a second: its
failures, and what begins only to fail, must not fill the log.
"""

from collections.abc import Mapping
from typing import Any

from titus_py.between.event_loop import EventLoop
from titus_py.supervisor.record import Record

__all__ = ["TunnelEvents"]

_SECONDS = 1.0
#: The server accepted the handshake, and then said why it wants none of this client after all: in
#: TLS 1.3, it judges a client's certificate after the client's own handshake is done.
_TURNED_DOWN = ("server_protocol_error", "server_reset")


class TunnelEvents:
    """Records the events that have a ``tunnel``, which is its listening address."""

    def __init__(self, loop: EventLoop, record: Record) -> None:
        self._loop = loop
        self._record = record
        #: The tunnels that have failed within this second: how often that was not logged, and the
        #: last of those events.
        self._failing: dict[str, tuple[int, str, Mapping[str, Any]]] = {}

    def __call__(self, name: str, generation: int, event: dict[str, Any]) -> None:
        alarm = event.get("level") == "alarm"
        failure = not alarm and _is_failure(name, event)
        if failure:
            event["level"] = "error"
        self._record.metrics.record(name, event, generation)
        tunnel = event["tunnel"]
        if failure and tunnel in self._failing:
            count, _, _ = self._failing[tunnel]
            self._failing[tunnel] = count + 1, name, event
        elif failure:
            self._say(tunnel, name, event)
        elif name != "connection_begun" or tunnel not in self._failing:
            self._record.log(name, **event)

    def _say(self, tunnel: str, name: str, event: Mapping[str, Any]) -> None:
        self._record.log(name, **event)
        self._failing[tunnel] = 0, "", {}
        self._loop.after(_SECONDS, lambda: self._second_is_over(tunnel))

    def _second_is_over(self, tunnel: str) -> None:
        count, name, event = self._failing.pop(tunnel)
        if count:
            self._say(tunnel, name, {**event, "count": count})


def _is_failure(name: str, event: Mapping[str, Any]) -> bool:
    if name == "tunnel_failed":
        return True
    turned_down = event.get("end") in _TURNED_DOWN and not event.get("octets_to_client")
    return name == "connection_ended" and turned_down
