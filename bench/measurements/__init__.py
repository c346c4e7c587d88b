"""What is measured, one module each: a function that fills a stage's results."""

from collections.abc import Callable

from bench.measurements import (
    burst,
    certificates,
    handshakes,
    idle,
    latency,
    signatures,
    transfers,
    tunnels,
)
from bench.stage import Stage

__all__ = ["MEASUREMENTS"]

#: In the order in which they run: latency needs to know what handshakes found.
MEASUREMENTS: dict[str, Callable[[Stage], None]] = {
    "handshakes": handshakes.measure,
    "one-core": handshakes.measure_one_core,
    "latency": latency.measure,
    "transfers": transfers.measure,
    "idle": idle.measure,
    "burst": burst.measure,
    "certificates": certificates.measure,
    "signatures": signatures.measure,
    "keyd": handshakes.measure_with_keyd,
    "tunnels": tunnels.measure,
}
