"""What idle connections cost: memory for each, the processor's time for all of them, and what
a newcomer has to wait for beside them."""

import time

from bench.load import quantile
from bench.measurements.latency import LIGHT_RATE
from bench.peers import Peer
from bench.processes import Failed, kernel_octets, pss_octets
from bench.stage import Proxy, Stage

__all__ = ["measure"]

_KEY_TYPE = "P-256"
_SETTLE_SECONDS = 0.5
_NEWCOMERS_SECONDS = 1.0


def measure(stage: Stage) -> None:
    with stage.backend() as backend:
        for _ in range(stage.scope.idle_rounds):
            for peer in stage.peers:
                _round(stage, peer, backend.port)


def _round(stage: Stage, peer: Peer, backend_port: int) -> None:
    """With a proxy that has just started, so that no earlier connection's memory is used again."""
    with stage.noting("idle", peer.name, {}) as started:
        with stage.proxy(peer, _KEY_TYPE, backend_port) as proxy:
            # Whatever it loads or makes for its first client is not the thousandth's.
            stage.small("closed", proxy, clients=4, seconds=0.3)
            time.sleep(_SETTLE_SECONDS)
            pss, kernel = pss_octets(proxy.pid), kernel_octets()
            started.values = {"pss": pss}
            with stage.load.holding(proxy.port) as hold:
                for count in stage.scope.idle_counts:
                    with stage.noting("idle", peer.name, {"connections": count}) as sample:
                        hold(count)
                        time.sleep(_SETTLE_SECONDS)
                        sample.values = {
                            "pss_each": (pss_octets(proxy.pid) - pss) / count,
                            "kernel_each": (kernel_octets() - kernel) / count,
                        }
                        if count == stage.scope.idle_counts[-1]:
                            sample.values |= _beside(stage, proxy)


def _beside(stage: Stage, proxy: Proxy) -> dict[str, float]:
    before, begun = proxy.cpu(), time.monotonic()
    time.sleep(stage.scope.idle_cpu)
    after, ended = proxy.cpu(), time.monotonic()
    outcome = stage.small("rate", proxy, rate=LIGHT_RATE, seconds=_NEWCOMERS_SECONDS)
    if not outcome.clients.done:
        raise Failed(f"no newcomer was served: {outcome.clients.failures}")
    return {
        "cpu_share": (after - before) / (ended - begun),
        "newcomer_median_ms": quantile(outcome.clients.first_us, 0.5) / 1000,
        "newcomer_failed": outcome.clients.failed,
    }
