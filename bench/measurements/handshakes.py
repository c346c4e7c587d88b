"""Full handshakes with one small request a second, by kind of key and number of clients.

And the same with each proxy on one processor and everything else on the others: there the
load takes nothing from the proxy, and it shows how cost grows with processors. And nginx alone,
with its key and with the key in keyd.
"""

import os

from bench.load import Load, Outcome
from bench.peers import WITH_KEYD
from bench.processes import Failed
from bench.stage import Proxy, Stage

__all__ = ["CLIENTS", "KEY_TYPES", "measure", "measure_one_core", "measure_with_keyd"]

KEY_TYPES = ("RSA-2048", "P-256")
CLIENTS = (1, 8, 32)


def measure(stage: Stage) -> None:
    with stage.backend() as backend:
        for key_type in KEY_TYPES:
            with stage.proxies("handshakes", key_type, backend.port) as proxies:
                for clients in CLIENTS:
                    for _ in range(stage.scope.rounds):
                        for proxy in proxies:
                            _round(stage, "handshakes", proxy, key_type, clients, stage.load)


def measure_with_keyd(stage: Stage) -> None:
    with stage.backend() as backend:
        for key_type in KEY_TYPES:
            with stage.proxies("keyd", key_type, backend.port, peers=WITH_KEYD) as proxies:
                for clients in CLIENTS:
                    for _ in range(stage.scope.rounds):
                        for proxy in proxies:
                            _round(stage, "keyd", proxy, key_type, clients, stage.load)


def measure_one_core(stage: Stage) -> None:
    cpus = os.sched_getaffinity(0)
    if len(cpus) < 2:
        stage.say("one-core: there is one processor only")
        return
    one = {min(cpus)}
    load = stage.load.on(cpus - one)
    with stage.backend(cpus - one) as backend:
        for key_type in KEY_TYPES:
            with stage.proxies("one-core", key_type, backend.port, one) as proxies:
                for _ in range(stage.scope.rounds):
                    for proxy in proxies:
                        _round(stage, "one-core", proxy, key_type, CLIENTS[-1], load)


def _round(
    stage: Stage, measurement: str, proxy: Proxy, key_type: str, clients: int, load: Load
) -> None:
    with stage.noting(measurement, proxy.name, {"key": key_type, "clients": clients}) as sample:
        before = proxy.cpu()
        outcome = stage.small(
            "closed", proxy, load, clients=clients, seconds=stage.scope.handshakes
        )
        after = proxy.cpu()
        sample.values = {
            "rate": outcome.clients.done / outcome.seconds,
            "cpu_ms": 1000 * (after - before) / _all_done(outcome),
            "load_cpu_share": outcome.cpu / outcome.seconds,
            "failed": outcome.clients.failed,
            "unclean": outcome.clients.unclean,
            "tickets": outcome.tickets,
        }


def _all_done(outcome: Outcome) -> int:
    done = outcome.clients.done + outcome.clients.late
    if not done:
        raise Failed(f"no exchange was done: {outcome.clients.failures}")
    return done
