"""Many clients at the same moment: how long the first octet takes, and who gets none.

Beside the larger burst newcomers arrive, twenty a second, until all of the burst are served.
"""

from bench.load import quantile
from bench.measurements.latency import LIGHT_RATE
from bench.processes import Failed
from bench.stage import Proxy, Stage

__all__ = ["LARGE", "SMALL", "measure"]

SMALL, LARGE = 200, 1000
_KEY_TYPE = "P-256"
_TIMEOUT_SECONDS = 20.0


def measure(stage: Stage) -> None:
    sizes = ((SMALL, stage.scope.bursts), (LARGE, stage.scope.large_bursts))
    with stage.backend() as backend:
        with stage.proxies("burst", _KEY_TYPE, backend.port) as proxies:
            for clients, rounds in sizes:
                for _ in range(rounds):
                    for proxy in proxies:
                        _round(stage, proxy, clients)


def _round(stage: Stage, proxy: Proxy, clients: int) -> None:
    with stage.noting("burst", proxy.name, {"clients": clients}) as sample:
        # Its size of pools and caches is what it has after some work.
        stage.small("closed", proxy, clients=4, seconds=0.2)
        rate = LIGHT_RATE if clients == LARGE else 0
        outcome = stage.small("once", proxy, clients=clients, rate=rate, timeout=_TIMEOUT_SECONDS)
        if not outcome.clients.done:
            raise Failed(f"no exchange was done: {outcome.clients.failures}")
        sample.times = outcome.clients.first_us
        sample.values = {
            "median_ms": quantile(sample.times, 0.5) / 1000,
            "p99_ms": quantile(sample.times, 0.99) / 1000,
            "last_ms": max(sample.times) / 1000,
            "failed": outcome.clients.failed,
            "newcomers_failed": outcome.newcomers.failed,
        }
        if outcome.newcomers.done:
            sample.values["newcomer_median_ms"] = quantile(outcome.newcomers.first_us, 0.5) / 1000
            sample.values["newcomer_max_ms"] = max(outcome.newcomers.first_us) / 1000
