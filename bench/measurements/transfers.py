"""Long transfers, down and up, one and several at once: octets a second, and what they cost.

A transfer counts only if it was complete: of a download, the length is that of the file; of
an upload, the backend has to answer how many octets came.
"""

from bench.backend import large
from bench.load import Outcome
from bench.processes import Failed
from bench.stage import Proxy, Stage

__all__ = ["STREAMS", "measure"]

STREAMS = (1, 4)
_KEY_TYPE = "P-256"
_TIMEOUT_SECONDS = 120


def measure(stage: Stage) -> None:
    with stage.backend() as backend:
        for direction, port in (("down", backend.port), ("up", backend.sink_port)):
            with stage.proxies("transfers", _KEY_TYPE, port) as proxies:
                for streams in STREAMS:
                    for _ in range(stage.scope.rounds):
                        for proxy in proxies:
                            _round(stage, proxy, direction, streams)


def _round(stage: Stage, proxy: Proxy, direction: str, streams: int) -> None:
    setting: dict[str, object] = {"direction": direction, "streams": streams}
    with stage.noting("transfers", proxy.name, setting) as sample:
        octets = stage.scope.transfer_octets
        before = proxy.cpu()
        outcome = _transfer(stage, proxy, direction, streams, octets)
        after = proxy.cpu()
        if outcome.clients.done < streams:
            raise Failed(f"incomplete: {outcome.clients.failures}")
        gibibytes = streams * octets / (1 << 30)
        sample.values = {
            "mb_per_second": streams * octets / outcome.seconds / 1e6,
            "cpu_per_gib": (after - before) / gibibytes,
            "load_cpu_per_gib": outcome.cpu / gibibytes,
        }


def _transfer(stage: Stage, proxy: Proxy, direction: str, streams: int, octets: int) -> Outcome:
    wanted: dict[str, str | float] = {"clients": streams, "timeout": _TIMEOUT_SECONDS}
    if direction == "down":
        wanted |= {"path": large(octets), "length": octets}
    else:
        wanted |= {"path": "/", "upload": octets}
    return stage.load.run("once", proxy.port, **wanted)
