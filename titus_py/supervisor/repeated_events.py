"""What may happen hundreds of times a second, and be one trouble: all counted, one line a second.

Run by the supervisor. A program whose tunnel fails may try again at once, and with a keyd that is
short of descriptors every client's handshake fails: that, and what begins only to fail, must not
fill the log. Alarms are not held back, but for those that keyd makes the parent raise: whoever
controls keyd can have any number, which would leave no room for others. What keyd says of itself is
told line by line, up to so many a second: what is beyond that is counted as lost.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from titus_py.between.event_loop import EventLoop
from titus_py.supervisor.record import Record

__all__ = ["RepeatedEvents"]

_SECONDS = 1.0
#: How many lines of keyd's are logged in a second.
_SAID_A_SECOND = 10
#: How many alarms of what a generation's keyd has refused have a line each within a second: for
#: each, a worker was taken over, which cost a connection.
_ALARMS_A_SECOND = 100
#: So many kinds of refusals are told apart within a second.
_KINDS = 8
#: The server accepted the handshake, and then said why it wants none of this client after all: in
#: TLS 1.3, it judges a client's certificate after the client's own handshake is done.
_TURNED_DOWN = ("server_protocol_error", "server_reset")

_Kind = tuple[str, ...]


class RepeatedEvents:
    def __init__(self, loop: EventLoop, record: Record) -> None:
        self._loop = loop
        self._record = record
        #: What was logged within this second, by kind: how often it has happened again, and the
        #: last of those events.
        self._repeated: dict[_Kind, tuple[int, str, Mapping[str, Any]]] = {}
        #: By generation, how many lines its keyd has said within this second, and how many alarms
        #: it has raised: a flood of one hides no other's.
        self._said: Counter[int] = Counter()
        self._alarms: Counter[int] = Counter()

    def of_tunnel(self, name: str, generation: int, event: dict[str, Any]) -> None:
        """Record an event that has a ``tunnel``, which is its listening address."""
        alarm = event.get("level") == "alarm"
        failure = not alarm and _is_failure(name, event)
        if failure:
            event["level"] = "error"
        self._record.metrics.record(name, event, generation)
        kind = ("tunnel", event["tunnel"])
        if failure:
            self._tell(kind, name, event)
        elif name != "connection_begun" or kind not in self._repeated:
            self._record.log(name, **event)

    def refused(self, name: str, generation: int, event: dict[str, Any]) -> None:
        """Record what keyd has refused. Nobody need be at fault, or it may be the client's way."""
        self._record.metrics.record(name, event, generation)
        if event["level"] == "alarm":
            if self._is_among_the_first_alarms(generation):
                self._record.log(name, **event)
            else:
                self._tell(("alarm", name, str(generation)), name, event)
            return
        kind: _Kind = (name, event["status"], event["attempted"])
        if kind not in self._repeated and sum(one[0] == name for one in self._repeated) >= _KINDS:
            # What is worse is not to go under in what is not.
            kind = (name, event["level"])
        self._tell(kind, name, event)

    def _is_among_the_first_alarms(self, generation: int) -> bool:
        if not self._alarms:
            self._loop.after(_SECONDS, self._alarms.clear)
        self._alarms[generation] += 1
        return self._alarms[generation] <= _ALARMS_A_SECOND

    def keyd_may_say_more(self, generation: int) -> bool:
        """Whether one more line of its keyd's is logged. If not, it is lost, and counted."""
        if not self._said:
            self._loop.after(_SECONDS, self._keyds_second_is_over)
        self._said[generation] += 1
        return self._said[generation] <= _SAID_A_SECOND

    def say_last(self) -> None:
        """Log what is held back now: the log is about to be closed."""
        for kind, (count, name, event) in self._repeated.items():
            if count:
                self._record.log(name, **event, count=count)
                # The second goes on: the log may be opened again.
                self._repeated[kind] = 0, "", {}
        self._say_keyds_lost()

    def _keyds_second_is_over(self) -> None:
        self._say_keyds_lost()
        self._said.clear()

    def _say_keyds_lost(self) -> None:
        for generation, said in self._said.items():
            if said > _SAID_A_SECOND:
                lost = said - _SAID_A_SECOND
                self._record.log(
                    "keyd_lines_lost", level="error", count=lost, generation=generation
                )
                self._said[generation] = _SAID_A_SECOND

    def _tell(self, kind: _Kind, name: str, event: Mapping[str, Any]) -> None:
        if kind in self._repeated:
            count, _, _ = self._repeated[kind]
            self._repeated[kind] = count + 1, name, event
        else:
            self._say(kind, name, event)

    def _say(self, kind: _Kind, name: str, event: Mapping[str, Any]) -> None:
        self._record.log(name, **event)
        self._repeated[kind] = 0, "", {}
        self._loop.after(_SECONDS, lambda: self._second_is_over(kind))

    def _second_is_over(self, kind: _Kind) -> None:
        count, name, event = self._repeated.pop(kind)
        if count:
            self._say(kind, name, {**event, "count": count})


def _is_failure(name: str, event: Mapping[str, Any]) -> bool:
    if name == "tunnel_failed":
        return True
    turned_down = event.get("end") in _TURNED_DOWN and not event.get("octets_to_client")
    return name == "connection_ended" and turned_down
