"""Plaintext programs through a tunnel, both ends on this machine; and beside it with none at all.

Two peers are no tunnels: "plain", the program's own connection, which shows what the programs
themselves can do; and "inet_tls", with which Erlang's nodes encrypt by themselves.
"""

import shutil
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from bench.exchanges import SIZES, Echo, Erlang, Program
from bench.processes import Failed, free_port, running
from bench.stage import Stage
from bench.tunnels import TUNNELS, Ends, Keys, Tunnel, inet_tls_options, make_keys

__all__ = ["INET_TLS", "PLAIN", "measure"]

PLAIN = "plain"
INET_TLS = "inet_tls"


class _Way(NamedTuple):
    """How a program's client reaches its server: by a port, with options for both."""

    name: str
    port: int
    options: Sequence[str] = ()


def measure(stage: Stage) -> None:
    keys = make_keys(stage.new_directory())
    for program in _programs(stage):
        with ExitStack() as stack:
            ways = _ways(stage, stack, program, keys)
            for _ in range(stage.scope.rounds):
                for way in ways:
                    _round(stage, program, way)


def _programs(stage: Stage) -> list[Program]:
    programs: list[Program] = []
    try:
        programs.append(Erlang(stage.new_directory()))
    except Failed as failed:
        stage.results.missing["Erlang"] = str(failed)
    return [*programs, Echo(stage.load.program.with_name("echo"))]


def _ways(stage: Stage, stack: ExitStack, program: Program, keys: Keys) -> list[_Way]:
    """All that start; what does not is noted."""
    ways: list[_Way] = []

    def serve(name: str, *options: str) -> None:
        with stage.noting("tunnels", name, {"program": program.name}):
            port, log = free_port(), stage.new_directory() / "log"
            command = program.serve(port, options)
            stack.enter_context(running(command, log, port, None, program.environment))
            ways.append(_Way(name, port, options))

    serve(PLAIN)
    for tunnel in TUNNELS if ways else ():
        if shutil.which(tunnel.program) is None:
            stage.results.missing[tunnel.name] = f"{tunnel.program} is not installed"
            continue
        with stage.noting("tunnels", tunnel.name, {"program": program.name}):
            ways.append(_begin(stage, stack, tunnel, keys, ways[0].port))
    if isinstance(program, Erlang):
        if program.has_tls:
            serve(INET_TLS, *inet_tls_options(keys, stage.new_directory() / "options"))
        else:
            stage.results.missing[INET_TLS] = "erlang-ssl is not installed"
    return ways


def _begin(stage: Stage, stack: ExitStack, tunnel: Tunnel, keys: Keys, backend: int) -> _Way:
    ends = Ends(stage.new_directory(), keys, free_port(), free_port(), backend)
    command = tunnel.configure(ends)
    stack.enter_context(running(command, ends.directory / "log", ends.port))
    return _Way(tunnel.name, ends.port)


def _round(stage: Stage, program: Program, way: _Way) -> None:
    setting: dict[str, object] = {"program": program.name}
    with stage.noting("tunnels", way.name, setting) as sample:
        times = program.run(way.port, stage.scope.tunnels, way.options)
        sample.values = {
            "rate": 1e9 * len(times.calls) / sum(times.calls),
            "connection_ms": statistics.median(times.connections) / 1e6,
            "long_s": times.long[0] / 1e9,
        }
        for octets, echoes in zip(SIZES, times.echoes, strict=True):
            sample.values[f"echo_{octets}_ms"] = statistics.median(echoes) / 1e6
