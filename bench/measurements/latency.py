"""Time from connecting to the first octet of the answer, where nobody has to queue for long.

Clients come at a fixed rate, whatever becomes of those before: few, and half as many as each
proxy could serve at most.
"""

from bench.load import quantile
from bench.measurements.handshakes import CLIENTS
from bench.processes import Failed
from bench.stage import Proxy, Stage

__all__ = ["LIGHT_RATE", "measure"]

LIGHT_RATE = 20.0


def measure(stage: Stage) -> None:
    with stage.backend() as backend:
        for key_type in stage.scope.latency_keys:
            with stage.proxies("latency", key_type, backend.port) as proxies:
                for load, seconds in (("light", stage.scope.light), ("half", stage.scope.half)):
                    for _ in range(stage.scope.rounds):
                        for proxy in proxies:
                            _round(stage, proxy, key_type, load, seconds)


def _round(stage: Stage, proxy: Proxy, key_type: str, load: str, seconds: float) -> None:
    with stage.noting("latency", proxy.name, {"key": key_type, "load": load}) as sample:
        rate = LIGHT_RATE if load == "light" else _saturation(stage, proxy.name, key_type) / 2
        outcome = stage.small("rate", proxy, rate=rate, seconds=seconds)
        if not outcome.clients.done:
            raise Failed(f"no exchange was done: {outcome.clients.failures}")
        sample.times = outcome.clients.first_us
        sample.values = {
            "rate": rate,
            "median_ms": quantile(sample.times, 0.5) / 1000,
            "p99_ms": quantile(sample.times, 0.99) / 1000,
            "failed": outcome.clients.failed,
        }


def _saturation(stage: Stage, peer: str, key_type: str) -> float:
    """The most exchanges a second that this one has shown."""
    found = [
        summary.median
        for clients in CLIENTS
        if (
            summary := stage.results.summary(
                "handshakes", peer, "rate", key=key_type, clients=clients
            )
        )
    ]
    if not found:
        raise Failed("how much it can serve was not measured")
    return max(found)
