"""Counts events. ``exposition`` writes the counts as Prometheus reads them.

Run by the supervisor, as root, within its event loop: counting must be cheap. Events come from
the parent and keyd, and some of their fields from workers, which an attacker may control. So a
worker's text becomes a label only if it is known here. No value of a field can make counting
fail.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from keyd.tally import LATENCY_BOUNDS
from titus_py.supervisor.counting import OTHER, Histogram, Tally
from titus_py.supervisor.events import ALARMS
from titus_py.supervisor.labels import (
    CERTIFICATE_REFUSALS,
    CHILDREN,
    DURATION_BOUNDS,
    ENDS,
    FAILURES,
    GROUPS,
    REFUSALS,
    SUITES,
    TUNNEL_FAILURES,
)
from titus_py.supervisor.token_counts import TokenCounts

__all__ = ["Metrics"]

#: Signals that tell something about a worker's end. A worker may choose among the others.
_TELLING_SIGNALS = ("SIGSYS", "SIGKILL", "SIGSEGV", "SIGBUS", "SIGILL", "SIGABRT", "SIGTRAP")
#: The most octets a second (100 Gbit/s) that a worker's report is believed.
_PLAUSIBLE_RATE = 12_500_000_000

#: How many known clients are counted by their names.
_MOST_CLIENTS = 4096

#: The counters that are plain numbers, by the names of their attributes.
_NUMBERS = (
    *("started", "accepted", "from_clients", "to_clients", "signed", "decrypted"),
    *("events_lost", "reloading", "last_reload_failed"),
)

_NOT_A_WORD = re.compile("[^a-z0-9]+")
_WORD_CHARACTERS = 48


class _Operations(NamedTuple):
    """What one keyd has done since it was started. ``buckets`` are cumulative."""

    signed: int = 0
    decrypted: int = 0
    refused: Mapping[str, int] = {}
    buckets: Sequence[int] = (0,) * (len(LATENCY_BOUNDS) + 1)
    seconds: float = 0.0


class Metrics:
    """The counters of the supervisor. They survive its children."""

    def __init__(self) -> None:
        self.started = time.time()
        self.accepted = 0
        self.ended = Tally(ENDS)
        self.handshakes: dict[tuple[str, str, str], int] = {}
        #: By the protocol that ALPN chose. The parent says which: it is one of the configuration's.
        self.protocols = Tally()
        self.failures = Tally(FAILURES)
        #: Signed for, and never asked for their backend: by the local address.
        self.unfinished = Tally()
        self.certificates_refused = Tally([*CERTIFICATE_REFUSALS, OTHER], room=0)
        #: By the address where a tunnel listens; and why its connections failed.
        self.tunnels = Tally()
        self.tunnel_failures = Tally([*TUNNEL_FAILURES, OTHER], room=0)
        self.from_clients = 0
        self.to_clients = 0
        self.durations = Histogram(DURATION_BOUNDS)
        self.worker_lifetimes = Histogram(DURATION_BOUNDS)
        self.signed = 0
        self.decrypted = 0
        self.refused = Tally(REFUSALS)
        self.keyd_latency = Histogram(LATENCY_BOUNDS)
        #: What each generation's keyd last reported.
        self._operations: dict[int, _Operations] = {}
        self.tokens = TokenCounts()
        self.alarms = Tally([*sorted(ALARMS), OTHER], room=0)
        self.deaths = Tally(CHILDREN)
        self.fork_servers_replaced = Tally(("daily", "crashes"))
        self.reloading = False
        self.reloads = {"ok": 0, "failed": 0}
        self.last_reload_failed = False
        self.limits = Tally(("full",))
        #: By the names of known clients: their connections that have ended, and which limit of
        #: theirs refused others.
        self.clients = Tally(room=_MOST_CLIENTS)
        self.clients_too_many = Tally(room=_MOST_CLIENTS)
        self.clients_too_fast = Tally(room=_MOST_CLIENTS)
        #: By the names of hosts that keys are lent to: what was done, and what was refused and why.
        self.lent = Tally(room=_MOST_CLIENTS)
        self.lending_refused = Tally(room=_MOST_CLIENTS)
        self.events_lost = 0
        self._handlers: dict[str, Callable[[Mapping[str, object], int], None]] = {
            "connection_begun": self._connection_begun,
            "connection_ended": self._connection_ended,
            "handshake_failed": self._handshake_failed,
            "tunnel_failed": self._tunnel_failed,
            "silent_clients": self._silent,
            "operations": self._keyd_operated,
            "token_operations": self.tokens.told,
            "keyd_started": self._keyd_started,
            "keyd_died": lambda *_: self.deaths.add("keyd"),
            "parent_died": lambda *_: self.deaths.add("parent"),
            "fork_server_died": lambda *_: self.deaths.add("fork_server"),
            "fork_server_replaced": self._fork_server_replaced,
            "resolver_died": lambda *_: self.deaths.add("resolver"),
            "metrics_died": lambda *_: self.deaths.add("metrics"),
            "worker_failed": lambda *_: self.deaths.add("worker"),
            "reloading": self._reload_begun,
            "reloaded": lambda *_: self._reload_ended("ok"),
            "reload_failed": lambda *_: self._reload_ended("failed"),
            "full": lambda *_: self.limits.add("full"),
            "limited": self._limited,
            "lent": self._lent,
            "events_lost": self._lost,
        }

    def record(self, event: str, fields: Mapping[str, object], generation: int = 0) -> None:
        """Count an event of the supervisor, or of a child of this generation.

        ``fields`` are as they are logged. Raises nothing.
        """
        handler = self._handlers.get(event)
        if handler is not None:
            handler(fields, generation)
        if fields.get("level") == "alarm":
            self.alarms.add(_word(event))

    def forget(self, generation: int) -> None:
        """Forget the reports of the keyd of a generation that has gone."""
        self._operations.pop(generation, None)
        self.tokens.forget(generation)

    @property
    def _tallies(self) -> dict[str, Tally]:
        return {
            "ended": self.ended,
            "failures": self.failures,
            "protocols": self.protocols,
            "unfinished": self.unfinished,
            "certificates_refused": self.certificates_refused,
            "tunnels": self.tunnels,
            "tunnel_failures": self.tunnel_failures,
            "refused": self.refused,
            **self.tokens.tallies,
            "alarms": self.alarms,
            "deaths": self.deaths,
            "fork_servers_replaced": self.fork_servers_replaced,
            "limits": self.limits,
            "clients": self.clients,
            "clients_too_many": self.clients_too_many,
            "clients_too_fast": self.clients_too_fast,
            "lent": self.lent,
            "lending_refused": self.lending_refused,
        }

    @property
    def _histograms(self) -> dict[str, Histogram]:
        return {
            "durations": self.durations,
            "worker_lifetimes": self.worker_lifetimes,
            "keyd_latency": self.keyd_latency,
        }

    def leave(self) -> dict[str, Any]:
        """All counters, as JSON values, for the next program (``inherit``)."""
        return {
            "numbers": {name: getattr(self, name) for name in _NUMBERS},
            "tallies": {name: tally.counts for name, tally in self._tallies.items()},
            "histograms": {
                name: [histogram.counts, histogram.sum]
                for name, histogram in self._histograms.items()
            },
            "handshakes": [[*key, count] for key, count in self.handshakes.items()],
            "operations": {number: list(done) for number, done in self._operations.items()},
            "tokens": self.tokens.leave(),
            "reloads": self.reloads,
        }

    def inherit(self, left: Mapping[str, Any]) -> None:
        """Go on counting from another program's counters, as far as they are known here too."""
        for name in _NUMBERS:
            setattr(self, name, left["numbers"].get(name, getattr(self, name)))
        for name, tally in self._tallies.items():
            tally.counts |= left["tallies"].get(name, {})
        for name, histogram in self._histograms.items():
            counts, total = left["histograms"].get(name, ([], 0.0))
            if len(counts) == len(histogram.counts):
                histogram.counts, histogram.sum = counts, total
        self.handshakes = {
            (version, suite, group): count for version, suite, group, count in left["handshakes"]
        }
        self._operations = {
            int(number): _Operations(*done) for number, done in left["operations"].items()
        }
        self.tokens.inherit(left.get("tokens", {}))
        self.reloads |= left["reloads"]

    def counts(self) -> dict[str, Any]:
        """The counts that ``titus-py status`` shows: those that fit in a few lines."""
        return {
            "accepted": self.accepted,
            "handshakes": sum(self.handshakes.values()),
            "protocols": self.protocols.some(),
            "failed": self.failures.some(),
            "certificates_refused": self.certificates_refused.some(),
            "tunnel_failures": self.tunnel_failures.some(),
            "unfinished": self.unfinished.some(),
            "ended": self.ended.some(),
            "octets_from_clients": self.from_clients,
            "octets_to_clients": self.to_clients,
            "signed": self.signed,
            "decrypted": self.decrypted,
            "refused": self.refused.some(),
            "alarms": self.alarms.some(),
            "deaths": self.deaths.some(),
            "limited": self.limits.some(),
            "clients": self.clients.some(),
            "clients_too_many": self.clients_too_many.some(),
            "clients_too_fast": self.clients_too_fast.some(),
            "lent": self.lent.some(),
            "lending_refused": self.lending_refused.some(),
            "reloads": self.reloads.copy(),
            "events_lost": self.events_lost,
        }

    # --- events -----------------------------------------------------------------

    def _connection_begun(self, fields: Mapping[str, object], generation: int) -> None:
        del generation
        self.accepted += 1
        if "tunnel" in fields:
            self.tunnels.add(str(fields["tunnel"]))

    def _connection_ended(self, fields: Mapping[str, object], generation: int) -> None:
        del generation
        # Missing if the parent was killed: then nobody knows how far the connection had come.
        if "tls_version" in fields:
            version = str(fields["tls_version"])
            suite = str(fields.get("cipher_suite"))
            group = str(fields.get("group") or "").lower()
            suites = SUITES.get(version)
            key = (
                OTHER if suites is None else version,
                suite if suites is not None and suite in suites else OTHER,
                GROUPS.get(group, OTHER),
            )
            self.handshakes[key] = self.handshakes.get(key, 0) + 1
        if "client_name" in fields:
            self.clients.add(str(fields["client_name"]))
        if "alpn" in fields:
            self.protocols.add(str(fields["alpn"]))
        self._over(fields, _end(fields))

    def _handshake_failed(self, fields: Mapping[str, object], generation: int) -> None:
        del generation
        end = _end(fields)
        self.failures.add(end)
        if fields.get("uid") is None:
            # Without a worker, it has no event at its beginning.
            self.accepted += 1
        if end == "client_certificate":
            self.certificates_refused.add(str(fields.get("detail")).partition(":")[0])
        self._over(fields, end)

    def _tunnel_failed(self, fields: Mapping[str, object], generation: int) -> None:
        del generation
        # It has no event at its beginning.
        self.accepted += 1
        end = _end(fields)
        why = str(fields.get("detail")).partition(":")[0] if end == "server_certificate" else end
        self.tunnel_failures.add(why)
        self._over(fields, end)

    def _silent(self, fields: Mapping[str, object], generation: int) -> None:
        """Count clients that said nothing, had no worker, and have one event together."""
        del generation
        end, count = _end(fields), _count(fields.get("count"))
        self.accepted += count
        self.failures.add(end, count)
        self.ended.add(end, count)
        # How long each took is not known.
        self.durations.observe(_number(fields.get("seconds")) / max(1, count), count)

    def _over(self, fields: Mapping[str, object], end: str) -> None:
        self.ended.add(end)
        if fields.get("unfinished"):
            self.unfinished.add(str(fields.get("local")))
        if "seconds" in fields:
            seconds = _number(fields["seconds"])
            self.durations.observe(seconds)
            most = int((seconds + 1) * _PLAUSIBLE_RATE)
            self.from_clients += min(most, _count(fields.get("octets_from_client")))
            self.to_clients += min(most, _count(fields.get("octets_to_client")))
        if "worker_seconds" in fields:
            self.worker_lifetimes.observe(_number(fields["worker_seconds"]))

    def _keyd_started(self, fields: Mapping[str, object], generation: int) -> None:
        """A new keyd counts from zero."""
        self.forget(_count(fields.get("generation")) or generation)

    def _keyd_operated(self, fields: Mapping[str, object], generation: int) -> None:
        refused, buckets = fields.get("refused"), fields.get("seconds")
        now = _Operations(
            _count(fields.get("signed")),
            _count(fields.get("decrypted")),
            {str(status): _count(count) for status, count in refused.items()}
            if isinstance(refused, Mapping)
            else {},
            [_count(count) for count in buckets] if isinstance(buckets, list) else (),
            _number(fields.get("seconds_sum")),
        )
        before = self._operations.get(generation, _Operations())
        if now.signed < before.signed or now.decrypted < before.decrypted:
            # This is another keyd, whose start was not heard.
            before = _Operations()
        self._operations[generation] = now
        self.signed += now.signed - before.signed
        self.decrypted += now.decrypted - before.decrypted
        for status, count in now.refused.items():
            self.refused.add(_word(status), max(0, count - before.refused.get(status, 0)))
        if len(now.buckets) == len(before.buckets) == len(LATENCY_BOUNDS) + 1:
            since = [new - old for new, old in zip(now.buckets, before.buckets, strict=True)]
            for number, (below, above) in enumerate(zip([0, *since], since, strict=False)):
                self.keyd_latency.counts[number] += max(0, above - below)
            self.keyd_latency.sum += max(0.0, now.seconds - before.seconds)

    def _fork_server_replaced(self, fields: Mapping[str, object], generation: int) -> None:
        del generation
        self.fork_servers_replaced.add("crashes" if fields.get("level") == "warning" else "daily")

    def _reload_begun(self, fields: Mapping[str, object], generation: int) -> None:
        del fields, generation
        self.reloading = True

    def _reload_ended(self, how: str) -> None:
        # A failed reload has an event for each mistake, but counts once.
        if self.reloading:
            self.reloading = False
            self.reloads[how] += 1
            self.last_reload_failed = how == "failed"

    def _limited(self, fields: Mapping[str, object], generation: int) -> None:
        del generation
        limit, count = str(fields.get("limit")), _count(fields.get("count", 1))
        self.limits.add(_word(limit), count)
        if "client_name" in fields:
            tally = self.clients_too_fast if limit == "client_rate" else self.clients_too_many
            tally.add(str(fields["client_name"]), count)

    def _lent(self, fields: Mapping[str, object], generation: int) -> None:
        del generation
        for tally, of in ((self.lent, "done"), (self.lending_refused, "refused")):
            counts = fields.get(of)
            for label, count in counts.items() if isinstance(counts, Mapping) else ():
                tally.add(str(label), _count(count))

    def _lost(self, fields: Mapping[str, object], generation: int) -> None:
        del generation
        self.events_lost += _count(fields.get("count"))


def _end(fields: Mapping[str, object]) -> str:
    """How a connection ended, as a label. A worker can choose only among labels known here."""
    # One that was to be killed, and ended otherwise before it was, has both.
    text = str(fields.get("how") or fields.get("end"))
    if text.startswith("exited with "):
        return "exited"
    if text.startswith("killed by "):
        return _word(text) if text.endswith(_TELLING_SIGNALS) else "killed"
    return _word(text.partition(":")[0])


def _word(text: str) -> str:
    if text.isascii() and text.isidentifier() and text.islower() and len(text) <= _WORD_CHARACTERS:
        return text
    return _NOT_A_WORD.sub("_", text.lower())[:_WORD_CHARACTERS].strip("_") or OTHER


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _number(value: object) -> float:
    """A duration in seconds; 0 for anything else (comparisons with NaN are false)."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e12 else 0.0
