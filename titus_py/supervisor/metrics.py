"""What is counted, and how Prometheus reads it (text exposition format 0.0.4).

Run by the supervisor, as root, within its event loop: counting must be cheap. What is
counted comes from the parent and keyd, and part of that from workers, which may have been
taken over. So no text of a worker's becomes a label unless it is one that is known here,
and nothing that a field holds can make counting fail.

Written out here because the usual client library loads OpenSSL, which this process does not.
"""

import re
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from keyd.protocol import Status
from keyd.tally import LATENCY_BOUNDS
from titus_py.between.report import End
from titus_py.supervisor.events import ALARMS

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Of connections and of workers: from a health check to a day of WebSocket.
_DURATION_BOUNDS = (
    0.01,
    0.03,
    0.1,
    0.3,
    1.0,
    3.0,
    10.0,
    30.0,
    60.0,
    300.0,
    1800.0,
    3600.0,
    86400.0,
)

_OTHER = "other"
_SUITES = {
    "TLSv1.3": frozenset(
        {
            "TLS_AES_256_GCM_SHA384",
            "TLS_CHACHA20_POLY1305_SHA256",
            "TLS_AES_128_GCM_SHA256",
            "TLS_AES_128_CCM_SHA256",
            "TLS_AES_128_CCM_8_SHA256",
        }
    ),
    # What keyd can be of use for: ECDHE, and the RSA key exchange.
    "TLSv1.2": frozenset(
        exchange + cipher
        for exchange in ("ECDHE-ECDSA-", "ECDHE-RSA-", "")
        for cipher in (
            "AES256-GCM-SHA384",
            "AES128-GCM-SHA256",
            "CHACHA20-POLY1305",
            "AES256-CCM",
            "AES128-CCM",
            "AES256-SHA384",
            "AES256-SHA256",
            "AES128-SHA256",
            "AES256-SHA",
            "AES128-SHA",
        )
    ),
}
#: By their names in lower case: OpenSSL's spelling has changed over time.
_GROUPS = {
    name.lower(): name
    for name in (
        "X25519MLKEM768",
        "SecP256r1MLKEM768",
        "SecP384r1MLKEM1024",
        "MLKEM512",
        "MLKEM768",
        "MLKEM1024",
        "x25519",
        "x448",
        "secp256r1",
        "secp384r1",
        "secp521r1",
        "ffdhe2048",
        "ffdhe3072",
        "ffdhe4096",
        "ffdhe6144",
        "ffdhe8192",
    )
} | {"prime256v1": "secp256r1", "": "none"}

#: A series that is not there before its first count looks to Prometheus as if it had never
#: risen: what the alert rules watch is there from the start, as zero.
_ENDS = tuple(end.name.lower() for end in End if end is not End.NONE)
_FAILURES = (
    "not_tls",
    "plain_http",
    "bad_client_hello",
    "no_virtual_host",
    "handshake_failed",
    "handshake_timeout",
    "client_left",
    "worker_failed",
)
_REFUSALS = tuple(status.name.lower() for status in Status if status is not Status.DONE)
_CHILDREN = ("keyd", "parent", "fork_server", "worker")
#: How many values a label may take on beyond those that are known beforehand.
_ROOM = 32
#: Signals that say something of a worker's end; a worker may choose among the others.
_TELLING_SIGNALS = ("SIGSYS", "SIGKILL", "SIGSEGV", "SIGBUS", "SIGILL", "SIGABRT", "SIGTRAP")
#: What a worker reports beyond this many octets a second (100 Gbit/s) is not true.
_PLAUSIBLE_RATE = 12_500_000_000

#: The counters that are plain numbers, as their attributes are named.
_NUMBERS = (
    "started",
    "accepted",
    "from_clients",
    "to_clients",
    "signed",
    "decrypted",
    "events_lost",
    "reloading",
    "last_reload_failed",
)

_NOT_A_WORD = re.compile("[^a-z0-9]+")
_WORD_CHARACTERS = 48


class _Tally:
    """Counts by the value of one label, which takes on only so many values."""

    def __init__(self, known: Iterable[str] = (), room: int = _ROOM) -> None:
        self.counts = dict.fromkeys(known, 0)
        self._most = len(self.counts) + room

    def add(self, value: str, count: int = 1) -> None:
        if value not in self.counts and len(self.counts) >= self._most:
            value = _OTHER
        self.counts[value] = self.counts.get(value, 0) + count

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def some(self) -> dict[str, int]:
        """Those that have been counted at all, the most frequent first."""
        counted = [(value, count) for value, count in self.counts.items() if count]
        return dict(sorted(counted, key=lambda pair: -pair[1]))


class _Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        #: Not cumulative; the last is of what is beyond all bounds.
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class _Operations(NamedTuple):
    """What one keyd has done since it was started. ``buckets`` are cumulative."""

    signed: int = 0
    decrypted: int = 0
    refused: Mapping[str, int] = {}
    buckets: Sequence[int] = (0,) * (len(LATENCY_BOUNDS) + 1)
    seconds: float = 0.0


class Metrics:
    """The counters of a supervisor's life: they survive its children."""

    def __init__(self) -> None:
        self._started = time.time()
        self._accepted = 0
        self._ended = _Tally(_ENDS)
        self._handshakes: dict[tuple[str, str, str], int] = {}
        self._failures = _Tally(_FAILURES)
        self._from_clients = 0
        self._to_clients = 0
        self._durations = _Histogram(_DURATION_BOUNDS)
        self._worker_lifetimes = _Histogram(_DURATION_BOUNDS)
        self._signed = 0
        self._decrypted = 0
        self._refused = _Tally(_REFUSALS)
        self._keyd_latency = _Histogram(LATENCY_BOUNDS)
        #: What each generation's keyd has last said.
        self._operations: dict[int, _Operations] = {}
        self._alarms = _Tally([*sorted(ALARMS), _OTHER], room=0)
        self._deaths = _Tally(_CHILDREN)
        self._reloading = False
        self._reloads = {"ok": 0, "failed": 0}
        self._last_reload_failed = False
        self._limits = _Tally(("full",))
        self._events_lost = 0
        self._handlers: dict[str, Callable[[Mapping[str, object], int], None]] = {
            "connection_begun": self._connection_begun,
            "connection_ended": self._connection_ended,
            "handshake_failed": self._handshake_failed,
            "operations": self._keyd_operated,
            "keyd_started": self._keyd_started,
            "keyd_died": lambda *_: self._deaths.add("keyd"),
            "parent_died": lambda *_: self._deaths.add("parent"),
            "fork_server_died": lambda *_: self._deaths.add("fork_server"),
            "worker_failed": lambda *_: self._deaths.add("worker"),
            "reloading": self._reload_begun,
            "reloaded": lambda *_: self._reload_ended("ok"),
            "reload_failed": lambda *_: self._reload_ended("failed"),
            "full": lambda *_: self._limits.add("full"),
            "limited": self._limited,
            "events_lost": self._lost,
        }

    def record(self, event: str, fields: Mapping[str, object], generation: int = 0) -> None:
        """Count an event, of the supervisor's own or of a child of this generation.

        ``fields`` are as they go to the log, ``level`` among them. Raises nothing.
        """
        handler = self._handlers.get(event)
        if handler is not None:
            handler(fields, generation)
        if fields.get("level") == "alarm":
            self._alarms.add(_word(event))

    def forget(self, generation: int) -> None:
        """A generation is gone, and what its keyd has said need not be remembered."""
        self._operations.pop(generation, None)

    @property
    def _tallies(self) -> dict[str, _Tally]:
        return {
            "ended": self._ended,
            "failures": self._failures,
            "refused": self._refused,
            "alarms": self._alarms,
            "deaths": self._deaths,
            "limits": self._limits,
        }

    @property
    def _histograms(self) -> dict[str, _Histogram]:
        return {
            "durations": self._durations,
            "worker_lifetimes": self._worker_lifetimes,
            "keyd_latency": self._keyd_latency,
        }

    def leave(self) -> dict[str, Any]:
        """All counters, as JSON has it, for the program that is to count on from here."""
        return {
            "numbers": {name: getattr(self, f"_{name}") for name in _NUMBERS},
            "tallies": {name: tally.counts for name, tally in self._tallies.items()},
            "histograms": {
                name: [histogram.counts, histogram.sum]
                for name, histogram in self._histograms.items()
            },
            "handshakes": [[*key, count] for key, count in self._handshakes.items()],
            "operations": {number: list(done) for number, done in self._operations.items()},
            "reloads": self._reloads,
        }

    def inherit(self, left: Mapping[str, Any]) -> None:
        """Count on from where another program's counters were: those that are known here, too."""
        for name in _NUMBERS:
            setattr(self, f"_{name}", left["numbers"].get(name, getattr(self, f"_{name}")))
        for name, tally in self._tallies.items():
            tally.counts |= left["tallies"].get(name, {})
        for name, histogram in self._histograms.items():
            counts, total = left["histograms"].get(name, ([], 0.0))
            if len(counts) == len(histogram.counts):
                histogram.counts, histogram.sum = counts, total
        self._handshakes = {
            (version, suite, group): count for version, suite, group, count in left["handshakes"]
        }
        self._operations = {
            int(number): _Operations(*done) for number, done in left["operations"].items()
        }
        self._reloads |= left["reloads"]

    def counts(self) -> dict[str, Any]:
        """Counts for ``titus-py status``: what can be told in a few lines."""
        return {
            "accepted": self._accepted,
            "handshakes": sum(self._handshakes.values()),
            "failed": self._failures.some(),
            "ended": self._ended.some(),
            "octets_from_clients": self._from_clients,
            "octets_to_clients": self._to_clients,
            "signed": self._signed,
            "decrypted": self._decrypted,
            "refused": self._refused.some(),
            "alarms": self._alarms.some(),
            "deaths": self._deaths.some(),
            "limited": self._limits.some(),
            "reloads": self._reloads.copy(),
            "events_lost": self._events_lost,
        }

    # --- events -----------------------------------------------------------------

    def _connection_begun(self, fields: Mapping[str, object], generation: int) -> None:
        del fields, generation
        self._accepted += 1

    def _connection_ended(self, fields: Mapping[str, object], generation: int) -> None:
        del generation
        # There is none where the parent was killed: nobody knows how far that one had come.
        if "tls_version" in fields:
            version = str(fields["tls_version"])
            suite = str(fields.get("cipher_suite"))
            group = str(fields.get("group") or "").lower()
            suites = _SUITES.get(version)
            key = (
                _OTHER if suites is None else version,
                suite if suites is not None and suite in suites else _OTHER,
                _GROUPS.get(group, _OTHER),
            )
            self._handshakes[key] = self._handshakes.get(key, 0) + 1
        self._over(fields, _end(fields))

    def _handshake_failed(self, fields: Mapping[str, object], generation: int) -> None:
        del generation
        end = _end(fields)
        self._failures.add(end)
        self._over(fields, end)

    def _over(self, fields: Mapping[str, object], end: str) -> None:
        self._ended.add(end)
        if "seconds" in fields:
            seconds = _number(fields["seconds"])
            self._durations.observe(seconds)
            most = int((seconds + 1) * _PLAUSIBLE_RATE)
            self._from_clients += min(most, _count(fields.get("octets_from_client")))
            self._to_clients += min(most, _count(fields.get("octets_to_client")))
        if "worker_seconds" in fields:
            self._worker_lifetimes.observe(_number(fields["worker_seconds"]))

    def _keyd_started(self, fields: Mapping[str, object], generation: int) -> None:
        """A new keyd counts from zero."""
        self._operations.pop(_count(fields.get("generation")) or generation, None)

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
            # Another keyd, whose start was not heard of.
            before = _Operations()
        self._operations[generation] = now
        self._signed += now.signed - before.signed
        self._decrypted += now.decrypted - before.decrypted
        for status, count in now.refused.items():
            self._refused.add(_word(status), max(0, count - before.refused.get(status, 0)))
        if len(now.buckets) == len(before.buckets) == len(LATENCY_BOUNDS) + 1:
            since = [new - old for new, old in zip(now.buckets, before.buckets, strict=True)]
            for number, (below, above) in enumerate(zip([0, *since], since, strict=False)):
                self._keyd_latency.counts[number] += max(0, above - below)
            self._keyd_latency.sum += max(0.0, now.seconds - before.seconds)

    def _reload_begun(self, fields: Mapping[str, object], generation: int) -> None:
        del fields, generation
        self._reloading = True

    def _reload_ended(self, how: str) -> None:
        # A failed one has an event for each mistake: it counts once.
        if self._reloading:
            self._reloading = False
            self._reloads[how] += 1
            self._last_reload_failed = how == "failed"

    def _limited(self, fields: Mapping[str, object], generation: int) -> None:
        del generation
        self._limits.add(_word(str(fields.get("limit"))), _count(fields.get("count", 1)))

    def _lost(self, fields: Mapping[str, object], generation: int) -> None:
        del generation
        self._events_lost += _count(fields.get("count"))

    # --- exposition -------------------------------------------------------------

    def exposition(self, status: Mapping[str, Any]) -> bytes:
        """Everything as Prometheus reads it; ``status`` is what ``titus-py status`` gets."""
        families = [
            *self._of_connections(status),
            *self._of_keyd(),
            *self._of_the_service(status),
        ]
        return "".join(family.text() for family in families).encode("utf-8", "backslashreplace")

    def _of_connections(self, status: Mapping[str, Any]) -> Iterator["_Family"]:
        live = sum(generation["connections"] for generation in status.get("generations", ()))
        yield _counter("connections_accepted", "Clients that were given a worker.").add(
            self._accepted
        )
        yield _gauge("connections_live", "Connections that have not ended.").add(live)
        yield _counter("connections_ended", "Connections by how they ended.").by("end", self._ended)
        handshakes = _counter(
            "handshakes", "Completed handshakes, counted when their connection has ended."
        )
        for (version, suite, group), count in self._handshakes.items():
            handshakes.add(count, version=version, suite=suite, group=group)
        yield handshakes
        yield _counter(
            "handshake_failures", "Connections that ended before their handshake, by why."
        ).by("reason", self._failures)
        yield (
            _counter(
                "transferred_bytes",
                "Octets of plaintext, counted when their connection has ended.",
            )
            .add(self._from_clients, direction="from_client")
            .add(self._to_clients, direction="to_client")
        )
        yield _histogram("connection_duration_seconds", "From accept to end.", self._durations)
        yield _histogram(
            "worker_lifetime_seconds",
            "From a worker's fork to its end, its time as a spare included.",
            self._worker_lifetimes,
        )

    def _of_keyd(self) -> Iterator["_Family"]:
        yield (
            _counter("keyd_operations", "Private-key operations that were granted.")
            .add(self._signed, operation="sign")
            .add(self._decrypted, operation="decrypt")
        )
        yield _counter("keyd_refusals", "Requests that keyd refused, by its answer.").by(
            "status", self._refused
        )
        yield _histogram(
            "keyd_operation_duration_seconds",
            "From a request's arrival at keyd to its answer.",
            self._keyd_latency,
        )

    def _of_the_service(self, status: Mapping[str, Any]) -> Iterator["_Family"]:
        yield _counter("alarms", "Events that no healthy instance has, by event.").by(
            "event", self._alarms
        )
        yield _counter("child_deaths", "Processes that ended unasked.").by("child", self._deaths)
        reloads = _counter("reloads", "Reloads of the configuration, by outcome.")
        for result, count in self._reloads.items():
            reloads.add(count, result=result)
        yield reloads
        yield _gauge(
            "last_reload_successful", "Whether the last reload took effect (1 without any)."
        ).add(int(not self._last_reload_failed))
        yield _counter("limits_hit", "Connections refused or ended by a limit, by limit.").by(
            "limit", self._limits
        )
        yield (
            _counter("events_lost", "Events that could not be recorded, by who lost them.")
            .add(self._events_lost, by="parent")
            .add(_count(status.get("log_lines_lost")), by="log")
        )
        expiry = _gauge(
            "certificate_expiry_timestamp_seconds", "When a certificate expires, in Unix time."
        )
        for certificate in status.get("certificates", ()):
            expiry.add(
                datetime.fromisoformat(certificate["not_after"]).timestamp(),
                subject=certificate["subject"],
                file=certificate["file"],
            )
        yield expiry
        yield from _of_generations(status)
        yield _gauge("start_time_seconds", "When the supervisor was started, in Unix time.").add(
            self._started
        )
        yield _gauge("build_info", "1, with the version that runs.").add(
            1, version=status.get("version", "")
        )


def _of_generations(status: Mapping[str, Any]) -> Iterator["_Family"]:
    states = {"serving": 0, "starting": 0, "retired": 0}
    serving: Mapping[str, Any] = {}
    for generation in status.get("generations", ()):
        states[generation["state"]] = states.get(generation["state"], 0) + 1
        if generation["state"] == "serving":
            serving = generation
    by_state = _gauge("generations", "Generations of the configuration that have processes.")
    for state, count in states.items():
        by_state.add(count, state=state)
    yield by_state
    if serving:
        yield _gauge("generation", "The number of the generation that serves.").add(
            serving["number"]
        )
    if "spares" in serving:
        yield _gauge("workers_spare", "Confined workers that wait for a client.").add(
            serving["spares"]
        )
    if "max_connections" in status:
        yield _gauge("connections_max", "How many connections may live at once.").add(
            status["max_connections"]
        )


class _Family:
    """A metric with all its samples."""

    def __init__(self, name: str, kind: str, description: str) -> None:
        self._name = name
        self._head = f"# HELP {name} {_escaped(description)}\n# TYPE {name} {kind}\n"
        #: By what identifies them: a series must not come twice.
        self._samples: dict[str, float] = {}

    def add(self, value: float, suffix: str = "", **labels: object) -> "_Family":
        text = ",".join(
            f'{name}="{_escaped(str(value), quote=True)}"' for name, value in labels.items()
        )
        self._samples[f"{self._name}{suffix}" + (f"{{{text}}}" if text else "")] = value
        return self

    def by(self, label: str, tally: _Tally) -> "_Family":
        for value, count in tally.counts.items():
            self.add(count, **{label: value})
        return self

    def text(self) -> str:
        samples = self._samples.items()
        return self._head + "".join(f"{name} {value!r}\n" for name, value in samples)


def _counter(name: str, description: str) -> _Family:
    return _Family(f"titus_{name}_total", "counter", description)


def _gauge(name: str, description: str) -> _Family:
    return _Family(f"titus_{name}", "gauge", description)


def _histogram(name: str, description: str, histogram: _Histogram) -> _Family:
    family = _Family(f"titus_{name}", "histogram", description)
    total = 0
    bounds = [f"{bound:g}" for bound in histogram.bounds]
    for bound, count in zip([*bounds, "+Inf"], histogram.counts, strict=True):
        total += count
        family.add(total, "_bucket", le=bound)
    return family.add(histogram.sum, "_sum").add(total, "_count")


def _escaped(text: str, quote: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quote else text


def _end(fields: Mapping[str, object]) -> str:
    """How a connection ended, as a label: a worker has no say beyond what is known here."""
    text = str(fields.get("end"))
    if text.startswith("exited with "):
        return "exited"
    if text.startswith("killed by "):
        return _word(text) if text.endswith(_TELLING_SIGNALS) else "killed"
    return _word(text.partition(":")[0])


def _word(text: str) -> str:
    if text.isascii() and text.isidentifier() and text.islower() and len(text) <= _WORD_CHARACTERS:
        return text
    return _NOT_A_WORD.sub("_", text.lower())[:_WORD_CHARACTERS].strip("_") or _OTHER


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _number(value: object) -> float:
    """A duration in seconds; 0 for what is none (a NaN, too, compares as false)."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e12 else 0.0
