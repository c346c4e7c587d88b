"""The metrics as Prometheus reads them (text exposition format 0.0.4). Run by the supervisor.

Written out here because the usual client library loads OpenSSL, which this process does not.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from keyd.upstream.state import READY
from titus_py.supervisor.counting import OTHER, Histogram, Tally
from titus_py.supervisor.labels import LENDING_REFUSALS
from titus_py.supervisor.metrics import Metrics

__all__ = ["exposition"]


def exposition(metrics: Metrics, status: Mapping[str, Any]) -> bytes:
    """Everything as Prometheus reads it; ``status`` is what ``titus-py status`` gets."""
    families = [
        *_of_connections(metrics, status),
        *_of_tunnels(metrics),
        *_of_keyd(metrics),
        *_of_tokens(metrics, status),
        *_of_upstreams(status),
        *_of_lending(metrics, status),
        *_of_the_service(metrics, status),
    ]
    return "".join(family.text() for family in families).encode("utf-8", "backslashreplace")


def _of_connections(metrics: Metrics, status: Mapping[str, Any]) -> Iterator["_Family"]:
    vhosts = status.get("vhosts", ())
    live = sum(generation["connections"] for generation in status.get("generations", ()))
    yield _counter(
        "connections_accepted", "Clients that had a worker, or said nothing until their end."
    ).add(metrics.accepted)
    yield _gauge("connections_live", "Connections that have not ended.").add(live)
    yield _counter("connections_ended", "Connections by how they ended.").by("end", metrics.ended)
    handshakes = _counter(
        "handshakes", "Completed handshakes, counted when their connection has ended."
    )
    for (version, suite, group), count in metrics.handshakes.items():
        handshakes.add(count, version=version, suite=suite, group=group)
    yield handshakes
    yield _counter(
        "protocols", "Connections by the protocol that was negotiated (ALPN), if any was."
    ).by("protocol", metrics.protocols)
    yield _counter(
        "handshake_failures", "Connections that ended before their handshake, by why."
    ).by("reason", metrics.failures)
    yield _counter(
        "signed_unfinished",
        "Connections that keyd signed for and that never asked for their backend, by local "
        "address. A worker that was taken over and asks for it is not among them.",
    ).by("listener", metrics.unfinished)
    yield _counter(
        "client_certificates_refused", "Handshakes that ended by the client's certificate, by why."
    ).by("reason", metrics.certificates_refused)
    yield _counter(
        "client_connections", "Connections of each [[vhost.client]], counted when they have ended."
    ).by("client", metrics.clients)
    known = _gauge("client_connections_live", "Connections that each [[vhost.client]] has.")
    for name, count in sorted(
        {one["name"]: one["live"] for vhost in vhosts for one in vhost.get("clients", ())}.items()
    ):
        known.add(count, client=name)
    yield known
    yield (
        _counter(
            "transferred_bytes",
            "Octets of plaintext, counted when their connection has ended.",
        )
        .add(metrics.from_clients, direction="from_client")
        .add(metrics.to_clients, direction="to_client")
    )
    yield _histogram("connection_duration_seconds", "From accept to end.", metrics.durations)
    yield _histogram(
        "worker_lifetime_seconds",
        "From a worker's fork to its end, its time as a spare included.",
        metrics.worker_lifetimes,
    )


def _of_tunnels(metrics: Metrics) -> Iterator["_Family"]:
    yield _counter(
        "tunnel_connections",
        "Tunnels' connections whose server was verified, by where they listen.",
    ).by("tunnel", metrics.tunnels)
    yield _counter("tunnel_failures", "Tunnels' connections that failed before, by reason.").by(
        "reason", metrics.tunnel_failures
    )


def _of_keyd(metrics: Metrics) -> Iterator["_Family"]:
    yield (
        _counter("keyd_operations", "Private-key operations that were granted.")
        .add(metrics.signed, operation="sign")
        .add(metrics.decrypted, operation="decrypt")
    )
    yield _counter("keyd_refusals", "Requests that keyd refused, by its answer.").by(
        "status", metrics.refused
    )
    yield _histogram(
        "keyd_operation_duration_seconds",
        "From a request's arrival at keyd to its answer.",
        metrics.keyd_latency,
    )


def _of_tokens(metrics: Metrics, status: Mapping[str, Any]) -> Iterator["_Family"]:
    ready = _gauge("token_ready", "Whether all keys in a token can be used (1) or not (0).")
    states: dict[str, bool] = {}
    for one in status.get("tokens", ()):
        # Two may have the same name.
        states[one["token"]] = states.get(one["token"], True) and one["state"] == "ready"
    for token, is_ready in states.items():
        ready.add(int(is_ready), token=token)
    yield ready
    operations = _counter("token_operations", "Signatures that a token was asked for, by result.")
    for result, tally in (("done", metrics.tokens.signed), ("failed", metrics.tokens.failed)):
        for token, count in tally.counts.items():
            operations.add(count, token=token, result=result)
    yield operations
    yield _counter(
        "token_logins", "Logins to a token: the first one, and one after each failure."
    ).by("token", metrics.tokens.logins)


def _of_upstreams(status: Mapping[str, Any]) -> Iterator["_Family"]:
    """As the serving generation's keyd has them: a reload begins anew."""
    up = _gauge(
        "keyd_upstream_up",
        "Whether a host that has keys (keyd.upstream) can be asked for all that are needed.",
    )
    waiting = _gauge("keyd_upstream_in_flight", "What it was asked and has not answered.")
    asked = _counter("keyd_upstream_answers", "What came of what it was asked, by outcome.")
    for one in status.get("upstreams", ()):
        name = one["upstream"]
        up.add(int(one["state"] == READY), upstream=name)
        waiting.add(one["in_flight"], upstream=name)
        asked.add(one["done"], upstream=name, result="signed")
        asked.add(one["failed"], upstream=name, result="failed")
    yield from (up, waiting, asked)


def _of_lending(metrics: Metrics, status: Mapping[str, Any]) -> Iterator["_Family"]:
    streams = _gauge("lending_streams", "Streams of each [[keyd.client]] to keyd.")
    for one in status.get("lending", ()):
        streams.add(one["streams"], client=one["client"])
    yield streams
    yield _counter("lent_operations", "Operations that keyd did for each [[keyd.client]].").by(
        "client", metrics.lent
    )
    refusals = _counter(
        "lending_refusals", "What keyd refused to each [[keyd.client]], and to others, by why."
    )
    if lending := status.get("lending", ()):
        refusals.add(0, client=OTHER, status="stranger")
    for one in lending:
        for why in LENDING_REFUSALS:
            refusals.add(0, client=one["client"], status=why)
    for of, count in metrics.lending_refused.counts.items():
        client, _, status_name = of.partition(" ")
        refusals.add(count, client=client, status=status_name or OTHER)
    yield refusals


def _of_the_service(metrics: Metrics, status: Mapping[str, Any]) -> Iterator["_Family"]:
    yield _counter("alarms", "Events that no healthy instance has, by event.").by(
        "event", metrics.alarms
    )
    yield _counter("child_deaths", "Processes that ended unasked.").by("child", metrics.deaths)
    yield _counter(
        "fork_servers_replaced",
        "Fork servers replaced for another memory layout: once a day, or after workers crashed.",
    ).by("reason", metrics.fork_servers_replaced)
    reloads = _counter("reloads", "Reloads of the configuration, by outcome.")
    for result, count in metrics.reloads.items():
        reloads.add(count, result=result)
    yield reloads
    yield _gauge(
        "last_reload_successful", "Whether the last reload took effect (1 without any)."
    ).add(int(not metrics.last_reload_failed))
    yield _counter("limits_hit", "Connections refused or ended by a limit, by limit.").by(
        "limit", metrics.limits
    )
    limits = _counter("client_limits_hit", "Connections refused by a [[vhost.client]]'s own limit.")
    for limit, tally in (
        ("client_connections", metrics.clients_too_many),
        ("client_rate", metrics.clients_too_fast),
    ):
        for client, count in tally.counts.items():
            limits.add(count, client=client, limit=limit)
    yield limits
    yield (
        _counter("events_lost", "Events that could not be recorded, by the process that lost them.")
        .add(metrics.events_lost, by="parent")
        .add(status.get("log_lines_lost", 0), by="log")
    )
    yield _of_backends(status)
    expiry = _gauge(
        "certificate_expiry_timestamp_seconds",
        "When a certificate expires, in Unix time; of a certificate_dir or a "
        "client_ca, the first that does.",
    )
    for certificate in status.get("certificates", ()):
        expiry.add(
            datetime.fromisoformat(certificate["not_after"]).timestamp(),
            subject=certificate["subject"],
            file=certificate["file"],
        )
    for directory in status.get("certificate_dirs", ()):
        expiry.add(
            datetime.fromisoformat(directory["not_after"]).timestamp(),
            subject=f"the first of {directory['directory']}",
            file=directory["first"],
        )
    lists = _gauge(
        "client_crl_expiry_timestamp_seconds",
        "When the first list of revoked client certificates in a file expires, in Unix time.",
    )
    for one in status.get("client_authorities", ()):
        of_lists = one["setting"] == "client_crl"
        labels = {"file": one["file"]} if of_lists else {"subject": "", "file": one["file"]}
        when = datetime.fromisoformat(one["not_after"]).timestamp()
        (lists if of_lists else expiry).add(when, **labels)
    yield expiry
    yield lists
    yield _gauge(
        "certificates_kept",
        "Certificates of directories whose new files are bad, so that the old ones are served.",
    ).add(status.get("certificates_kept", 0))
    yield from _of_generations(status)
    yield _gauge("start_time_seconds", "When the supervisor was started, in Unix time.").add(
        metrics.started
    )
    yield _gauge("build_info", "1, with the version that runs.").add(
        1, version=status.get("version", "")
    )


def _of_backends(status: Mapping[str, Any]) -> "_Family":
    """If a backend is checked in several ways, it is up if all find it so."""
    states: dict[str, bool] = {}
    for vhost in status.get("vhosts", ()):
        for one in vhost["health"]:
            states[one["backend"]] = states.get(one["backend"], True) and one["up"]
    family = _gauge("backend_up", "Whether health checks find a backend up (1) or down (0).")
    for backend, up in states.items():
        family.add(int(up), backend=backend)
    return family


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
    # Each is there without a number, too: the guide has those that there are.
    number = _gauge("generation", "The number of the generation that serves.")
    spares = _gauge("workers_spare", "Confined workers that wait for a client.")
    most = _gauge("connections_max", "How many connections may live at once.")
    if serving:
        number.add(serving["number"])
    if "spares" in serving:
        spares.add(serving["spares"])
    if "max_connections" in status:
        most.add(status["max_connections"])
    yield from (number, spares, most)


class _Family:
    """A metric with all its samples."""

    def __init__(self, name: str, kind: str, description: str) -> None:
        self._name = name
        self._head = f"# HELP {name} {_escaped(description)}\n# TYPE {name} {kind}\n"
        #: By name and labels: no series may come twice.
        self._samples: dict[str, float] = {}

    def add(self, value: float, suffix: str = "", **labels: object) -> "_Family":
        text = ",".join(
            f'{name}="{_escaped(str(value), quote=True)}"' for name, value in labels.items()
        )
        self._samples[f"{self._name}{suffix}" + (f"{{{text}}}" if text else "")] = value
        return self

    def by(self, label: str, tally: Tally) -> "_Family":
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


def _histogram(name: str, description: str, histogram: Histogram) -> _Family:
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
